"""Runs the model: one prompt into a cache of its own, or one token for every running row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from serve_app.engines.masks import DecodeMask, Mask
from serve_app.engines.recording import ExpertRecorder
from serve_app.engines.slots import SlotCache
from serve_app.engines.weights import load_weights
from serve_app.records import Ids

PREFILL_PIECE = 2048


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A processed prompt: its cache, ``logits`` ``[1, vocab]`` after it, its experts if wanted."""

    tokens: int
    cache: DynamicCache
    logits: torch.Tensor
    experts: Ids | None


class ModelRunner:
    """A model and the batch in its KV cache. Used by one thread at a time.

    Raises ValueError for a model that cannot be batched this way.
    """

    def __init__(self, model: PreTrainedModel, recorder: ExpertRecorder | None) -> None:
        self._model = model
        self._recorder = recorder
        self._mask = DecodeMask(model)
        self._slots = SlotCache()

    def rehearse(self) -> None:
        """Run one token after another once, so that a model that cannot fails at load."""
        self.join(self.prefill([0], record=True))
        self.decode([0], record=True)
        self.leave(0)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], *, record: bool) -> Prefilled:
        """Process a prompt alone, as a plain forward pass would.

        In pieces, because eager attention takes memory for every pair of tokens in one.
        """
        cache = DynamicCache()
        experts: list[Ids] = []
        for start in range(0, len(tokens), PREFILL_PIECE):
            piece = torch.tensor([tokens[start : start + PREFILL_PIECE]], device=self._model.device)
            logits, ids = self._forward(piece, record=record, cache=cache)
            if ids is not None:
                experts.append(ids)
        return Prefilled(len(tokens), cache, logits, np.concatenate(experts) if experts else None)

    @torch.inference_mode()
    def join(self, prefilled: Prefilled) -> None:
        """Add a processed prompt to the batch, as its last row."""
        self._slots.join(prefilled.cache, prefilled.tokens)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Remove a row at once; the last row takes its place."""
        self._slots.leave(row)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], *, record: bool) -> tuple[torch.Tensor, Ids | None]:
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
    ) -> tuple[torch.Tensor, Ids | None]:
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
        return logits, captured.ids()
