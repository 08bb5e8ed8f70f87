"""The growing buffer of one rollout's expert ids."""

from collections.abc import Sequence

import numpy as np

from serve_app.records import Ids, narrowest_dtype


class ExpertRows:
    """``[rows, layers, top_k]`` in the stored dtype; columns of dense layers stay 0.

    Takes no memory before the first row comes; then room for ``capacity`` rows, later doubled.
    """

    def __init__(
        self, *, layers: int, moe_layers: Sequence[int], top_k: int, num_experts: int, capacity: int
    ) -> None:
        self.num_experts = num_experts
        self.moe_layers = tuple(moe_layers)
        self._columns = slice(None) if len(moe_layers) == layers else list(moe_layers)
        self._capacity = capacity
        self._ids: Ids = np.zeros((0, layers, top_k), dtype=narrowest_dtype(num_experts))
        self._rows = 0

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self._rows

    def append(self, ids: Ids) -> None:
        """Add rows ``[rows, moe_layers, top_k]``."""
        end = self._rows + len(ids)
        if end > len(self._ids):
            self._grow(max(end, self._capacity, 2 * len(self._ids)))
        self._ids[self._rows : end, self._columns] = ids
        self._rows = end

    def first(self, rows: int) -> Ids:
        """Return the first ``rows`` rows, not copied."""
        assert rows <= self._rows, (rows, self._rows)
        return self._ids[:rows]

    def _grow(self, rows: int) -> None:
        grown = np.zeros((rows, *self._ids.shape[1:]), dtype=self._ids.dtype)
        grown[: self._rows] = self._ids[: self._rows]
        self._ids = grown
