"""Runs the model: one prompt into a cache of its own, or one token for every running row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from serve_app.engines.moe import family_of
from serve_app.engines.transformers.masks import DecodeMask, Mask
from serve_app.engines.transformers.recording import Captured, ExpertRecorder
from serve_app.engines.transformers.slots import SlotCache
from serve_app.engines.transformers.weights import ParkedWeights, load_weights

# In a pass of several tokens their layers start from nothing, so a prompt is never cut.
WHOLE_PROMPTS = frozenset({"jamba"})


@dataclass(slots=True)
class Prompt:
    """A prompt being processed: its own cache, and ``logits`` ``[1, vocab]`` once it is done."""

    tokens: Sequence[int]
    cache: DynamicCache | None = None
    done: int = 0
    logits: torch.Tensor | None = None

    @property
    def left(self) -> int:
        """Tokens still to be processed."""
        return len(self.tokens) - self.done


class ModelRunner:
    """A model and the batch in its KV cache. Used by one thread at a time.

    Raises ValueError for a model that cannot be batched this way.
    """

    def __init__(self, model: PreTrainedModel, recorder: ExpertRecorder | None) -> None:
        self._model = model
        self._recorder = recorder
        self._mask = DecodeMask(model)
        self._slots = SlotCache()
        self._parked: ParkedWeights | None = None
        self._whole_prompts = family_of(model) in WHOLE_PROMPTS

    def rehearse(self) -> None:
        """Run a prompt in two pieces and a step, so that a model that cannot fails at load."""
        prompt = Prompt([0, 0])
        passes = []
        while prompt.left:
            passes.append(self.process(prompt, 1, record=True))
        self.join(prompt)
        passes.append(self.decode([0], record=True)[1])
        self.leave(0)
        for captured in passes:
            if captured is not None:
                captured.ids()

    @torch.inference_mode()
    def process(self, prompt: Prompt, tokens: int, *, record: bool) -> Captured | None:
        """Process up to ``tokens`` more of a prompt, alone; return their experts if wanted.

        All that are left, where the model cannot go on in the middle.
        """
        if prompt.cache is None:
            # Told the layers only where they differ: it would cut windows, which slots need whole.
            config = self._model.config if self._mask.stateful else None
            prompt.cache = DynamicCache(config=config)
        stop = None if self._whole_prompts else prompt.done + tokens
        piece = prompt.tokens[prompt.done : stop]
        logits, experts = self._forward(
            torch.tensor([piece], device=self._model.device), record=record, cache=prompt.cache
        )
        prompt.done += len(piece)
        prompt.logits = None if prompt.left else logits
        return experts

    @torch.inference_mode()
    def join(self, prompt: Prompt) -> None:
        """Copy a processed prompt into the batch, as its last row."""
        assert prompt.cache is not None
        self._slots.join(prompt.cache, len(prompt.tokens))

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Remove a row at once; the last row takes its place."""
        self._slots.leave(row)

    @torch.inference_mode()
    def decode(
        self, tokens: Sequence[int], *, record: bool
    ) -> tuple[torch.Tensor, Captured | None]:
        """Process one token a row; return logits ``[rows, vocab]`` and the rows' experts."""
        device = self._model.device
        positions = self._slots.begin_step(device)[:, None]
        result = self._forward(
            torch.tensor(tokens, device=device)[:, None],
            record=record,
            cache=self._slots,
            position_ids=positions,
            attention_mask=self._mask.of(positions, max(self._slots.lengths) + 1),
        )
        self._slots.end_step()
        return result

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take new weights, already checked. The batch must be empty: its cache is of the old."""
        assert not self._slots.lengths
        load_weights(self._model, state)

    def sleep(self, *, keep: bool) -> None:
        """Take the weights out of the model. The batch must be empty."""
        assert not self._slots.lengths
        if self._parked is None:
            self._parked = ParkedWeights(self._model, keep=keep)
        elif not keep:
            self._parked.drop()

    def wake(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Put the weights back, or other ones; those that were not kept must be given."""
        if self._parked is not None:
            assert state is not None or self._parked.kept
            self._parked.restore()
            self._parked = None
        if state is not None:
            load_weights(self._model, state)

    def close(self) -> None:
        """Let go of the model and the batch."""
        self._slots.clear()
        if self._recorder is not None:
            self._recorder.close()
        del self._model

    def _forward(
        self,
        ids: torch.Tensor,
        *,
        record: bool,
        cache: DynamicCache | SlotCache,
        **inputs: Mask,
    ) -> tuple[torch.Tensor, Captured | None]:
        def run() -> torch.Tensor:
            output = self._model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits

        if self._recorder is None or not record:
            return run(), None
        with self._recorder.capture() as captured:
            logits = run()
        return logits, captured
