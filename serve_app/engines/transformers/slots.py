"""The KV cache of the running batch: one slot a request, every slot from column 0 on.

From column 0, because then the sums of attention run over the same columns as in a plain
forward pass of that sequence, and what is behind them adds exact zeros: routes recorded in
bf16 are the ones that teacher forcing finds. With padding on the left they aren't.

Rows ``0 .. running-1`` are in use; the last row moves into the place of one that leaves.
"""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
)

from serve_app.engines.transformers.states import StateLayer

FIRST_COLUMNS = 256


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, each ``[rows, heads, columns, head_dim]``.

    Made from a first request's own keys and values, whose shapes it takes.
    """

    def __init__(self, first: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = _stored(first)
        self._keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[3])
        self._values = values.new_zeros(0, values.shape[1], 0, values.shape[3])
        self._positions = torch.empty(0, dtype=torch.long)
        self._width = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def reserve(self, rows: int, columns: int) -> None:
        """Grow to at least this many; never shrink."""
        self._keys = _grown(self._keys, rows, columns)
        self._values = _grown(self._values, rows, columns)

    def insert(self, row: int, layer: DynamicLayer) -> None:
        """Fill a row from a request's own ``[1, heads, tokens, head_dim]``."""
        for mine, given in zip((self._keys, self._values), _stored(layer), strict=True):
            tokens = given.shape[2]
            mine[row, :, :tokens] = given[0]
            # The mask gives what is behind weight 0, but 0 times a stale NaN is NaN.
            mine[row, :, tokens:] = 0

    def leave(self, row: int, last: int) -> None:
        """Remove a row; the last one takes its place."""
        if row != last:
            self._keys[row] = self._keys[last]
            self._values[row] = self._values[last]

    def begin_step(self, positions: torch.Tensor, width: int) -> None:
        """Say where row *i*'s next token goes, ``positions[i]``, and how many columns are used."""
        self._positions = positions
        self._width = width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a row, ``[rows, heads, 1, head_dim]``; return all columns in use."""
        rows = len(self._positions)
        index = torch.arange(rows, device=key_states.device)
        self._keys[index, :, self._positions] = key_states[:, :, 0]
        self._values[index, :, self._positions] = value_states[:, :, 0]
        return self._keys[:rows, :, : self._width], self._values[:rows, :, : self._width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that `update` is going to return, and their offset."""
        return self._width, 0

    def get_seq_length(self) -> int:
        """Return the columns before the longest row's next token."""
        return max(self._width - 1, 0)

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1


class SlotCache(Cache):
    """The cache of all running requests; ``lengths[row]`` tokens are stored in each row."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._slots: list[Any] = []  # SlotLayer or StateLayer

    def join(self, prefilled: DynamicCache, tokens: int) -> int:
        """Copy a request's own cache of ``tokens`` columns into the next row; return the row."""
        if not self._slots:
            self._slots = [_slots_like(layer) for layer in prefilled.layers]
            self.layers = list(self._slots)
        row = len(self.lengths)
        self.lengths.append(tokens)
        self._reserve()
        for slot, layer in zip(self._slots, prefilled.layers, strict=True):
            slot.insert(row, layer)
        return row

    def leave(self, row: int) -> None:
        """Free a row; the last row becomes this one."""
        last = len(self.lengths) - 1
        for slot in self._slots:
            slot.leave(row, last)
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.lengths.clear()
        self._slots = []
        self.layers = []

    def begin_step(self, device: torch.device) -> torch.Tensor:
        """Make room for one token a row; return their positions ``[rows]``."""
        self._reserve()
        positions = torch.tensor(self.lengths, dtype=torch.long, device=device)
        for slot in self._slots:
            slot.begin_step(positions, max(self.lengths) + 1)
        return positions

    def end_step(self) -> None:
        """Count the tokens that the step wrote."""
        self.lengths = [length + 1 for length in self.lengths]

    def _reserve(self) -> None:
        rows, columns = len(self.lengths), max(self.lengths) + 1
        for slot in self._slots:
            slot.reserve(rows, columns)


def _slots_like(layer: Any) -> SlotLayer | StateLayer:
    if isinstance(layer, LinearAttentionLayer):
        return StateLayer(layer)
    return SlotLayer(layer)


def _stored(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a request's own keys and values, ``[1, heads, tokens, head_dim]``."""
    assert type(layer) is DynamicLayer
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _grown(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the tensor with room for rows and columns, doubled where it was too small."""
    have_rows, heads, have_columns, dim = tensor.shape
    if rows <= have_rows and columns <= have_columns:
        return tensor
    wanted_rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
    wanted_columns = (
        have_columns if columns <= have_columns else max(columns, 2 * have_columns, FIRST_COLUMNS)
    )
    grown = tensor.new_zeros(wanted_rows, heads, wanted_columns, dim)
    grown[:have_rows, :, :have_columns] = tensor
    return grown
