"""A model in plain Transformers, which engines are compared with."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from serve_app.engines.moe import find_moe_blocks
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.records import Ids
from tests.engine_contract import Weights


class PlainModel:
    """The checkpoint in plain Transformers."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        )
        self.recorder = ExpertRecorder(find_moe_blocks(self.model))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)

    @torch.inference_mode()
    def teacher_force(self, tokens: list[int]) -> tuple[Ids, torch.Tensor]:
        """One forward pass over the whole sequence."""
        with self.recorder.capture() as captured:
            logits = self.model(input_ids=torch.tensor([tokens])).logits[0]
        return captured.ids(), logits.float().log_softmax(-1)

    @torch.inference_mode()
    def teacher_force_stepwise(self, prompt: list[int], output: list[int]) -> tuple[Any, Any]:
        """The prompt in one pass, then token after token: the engine's own shapes."""
        cache, experts, logprobs = DynamicCache(), [], []
        for tokens in (prompt, *([token] for token in output[:-1])):
            with self.recorder.capture() as captured:
                logits = self.model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits
            experts.append(torch.from_numpy(captured.ids()))
            logprobs.append(logits[0, -1].float().log_softmax(-1))
        return torch.cat(experts).numpy(), torch.stack(logprobs)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def weights(self) -> Weights:
        return self.model.state_dict()
