"""The growing buffer of one rollout's expert ids."""

from collections.abc import Sequence

import numpy as np

from serve_app.engines.transformers.recording import Captured, convert
from serve_app.records import Ids, narrowest_dtype

PENDING = 64  # rows converted at once


class ExpertRows:
    """``[rows, layers, top_k]`` in the stored dtype; columns of dense layers stay 0.

    Passes collect until they make `PENDING` rows or the rows are wanted, and are converted
    together; a pass that several rollouts share is converted once. Takes no memory before that,
    then room for ``capacity`` rows, later doubled.
    """

    def __init__(
        self, *, layers: int, moe_layers: Sequence[int], top_k: int, num_experts: int, capacity: int
    ) -> None:
        self.num_experts = num_experts
        self.moe_layers = tuple(moe_layers)
        self.rows = 0
        self._columns = slice(None) if len(moe_layers) == layers else list(moe_layers)
        self._capacity = capacity
        self._ids: Ids = np.zeros((0, layers, top_k), dtype=narrowest_dtype(num_experts))
        self._filled = 0
        self._pending: list[tuple[Captured, slice]] = []

    def append(self, captured: Captured, tokens: slice, rows: int) -> None:
        """Add the ``rows`` tokens of a pass that are in the slice ``tokens``."""
        self._pending.append((captured, tokens))
        self.rows += rows
        if self.rows - self._filled >= PENDING:
            self._fill()

    def first(self, rows: int) -> Ids:
        """Return the first ``rows`` rows, not copied."""
        assert rows <= self.rows, (rows, self.rows)
        self._fill()
        return self._ids[:rows]

    def _fill(self) -> None:
        if not self._pending:
            return
        if new := [captured for captured, _ in self._pending if not captured.is_converted]:
            convert(new)
        if self.rows > len(self._ids):
            self._grow(max(self.rows, self._capacity, 2 * len(self._ids)))
        parts = [captured.ids()[tokens] for captured, tokens in self._pending]
        self._ids[self._filled : self.rows, self._columns] = np.concatenate(parts)
        self._filled = self.rows
        self._pending.clear()

    def _grow(self, rows: int) -> None:
        grown = np.zeros((rows, *self._ids.shape[1:]), dtype=self._ids.dtype)
        grown[: self._filled] = self._ids[: self._filled]
        self._ids = grown
