"""Which columns a row's next token may look at, said in the form that the model takes."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from serve_app.engines.moe import family_of

FULL = "full_attention"
SLIDING = "sliding_attention"
# Layers with a state a row, whatever its length. They see no padding in a step of one token.
STATEFUL = frozenset({"linear_attention", "conv"})
OWN_CACHE = frozenset({"minimax"})  # families that take no other cache than their own

Mask = torch.Tensor | dict[str, torch.Tensor]


class DecodeMask:
    """Masks for one new token a row, each row from column 0 on.

    Rows have different lengths, so a window cannot be left to the model, which slides it from
    the end of the longest row. Raises ValueError for a model with layers that keep anything but
    keys and values of every token, or one state: a batch of slots would lose that silently.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config(decoder=True)
        types, details = get_layer_types_and_kwargs(config)
        known = {FULL, SLIDING} | STATEFUL
        if STATEFUL.intersection(types):
            known = set() if family_of(model) in OWN_CACHE else {FULL} | STATEFUL
        if unknown := set(types) - known:
            raise ValueError(
                f"{family_of(model)}: expected layers of {FULL} or {SLIDING}, or {FULL} with"
                f" {' or '.join(sorted(STATEFUL))}, got {', '.join(sorted(unknown))}"
            )
        self.stateful = bool(STATEFUL.intersection(types))
        windows = {detail["sliding_window"] for detail in details if "sliding_window" in detail}
        if len(windows) > 1:
            raise ValueError(
                f"{family_of(model)}: expected one sliding window, got {sorted(windows)}"
            )
        self._types = frozenset(types)
        self._window: int | None = windows.pop() if windows else None
        self._dtype = model.dtype

    def of(self, positions: torch.Tensor, columns: int) -> Mask:
        """Return the mask for tokens at ``positions`` ``[rows, 1]`` over ``columns`` columns.

        Without a window ``[rows, columns]`` as every model takes it; with one, the additive
        ``[rows, 1, 1, columns]`` that is passed through, one a layer type if there are two.
        """
        column = torch.arange(columns, device=positions.device)
        causal = column <= positions
        if self._window is None:
            return causal.long()
        near = self._additive(causal & (column > positions - self._window))
        if self._types == {SLIDING}:
            return near
        return {FULL: self._additive(causal), SLIDING: near}

    def _additive(self, allowed: torch.Tensor) -> torch.Tensor:
        lowest = torch.finfo(self._dtype).min
        mask = torch.zeros(allowed.shape, dtype=self._dtype, device=allowed.device)
        return mask.masked_fill(~allowed, lowest)[:, None, None]
