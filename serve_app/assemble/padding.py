"""Rows that no record covers: which ids they have is a policy, and all of them are invalid."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.types import BatchSpec

Array = npt.NDArray[Any]
Valid = npt.NDArray[np.bool_]
_AT_ONCE = 1 << 16
"""Ids of padding that are computed at once: they take 8 bytes each meanwhile."""


class Padding:
    """Fills rows that no record covers with the ids that a batch's pad policy asks for.

    They depend on the row of the padded batch, the layer and the seed alone, so the ranks' parts
    together are the whole, padding included.
    """

    def __init__(self, spec: BatchSpec, num_experts: int, columns: Sequence[int] = ()) -> None:
        self._policy = spec.pad
        self._experts = num_experts
        self._seed = np.array([spec.pad_seed % 2**64], np.uint64)
        self._columns = np.array(columns, np.uint64)

    def fill(self, ids: Array, valid: Valid, at: int = 0) -> None:
        """Fill ``ids`` ``[rows, layers, top_k]`` of the padded batch's rows from ``at`` on.

        All of them are invalid, whatever the ids.
        """
        valid[:] = False
        if self._policy == "mask":
            ids[:] = 0
            return
        rows, layers, top_k = ids.shape
        for first in range(0, rows, stretch := max(1, _AT_ONCE // max(1, layers * top_k))):
            some = ids[first : first + stretch]
            row = np.arange(at + first, at + first + len(some), dtype=np.uint64)
            if self._policy == "spread":
                some[:] = self._spread(row, top_k)[:, None]
            else:
                some[:] = self._random(row, top_k)

    def _spread(self, row: Array, top_k: int) -> Array:
        counted = row[:, None] * np.uint64(top_k) + np.arange(top_k, dtype=np.uint64)
        return counted % np.uint64(self._experts)

    def _random(self, row: Array, top_k: int) -> Array:
        slot = self._columns[:, None] << np.uint64(32) | np.arange(top_k, dtype=np.uint64)
        key = _scrambled(_scrambled(self._seed) + row)
        return _scrambled(key[:, None, None] + slot) % np.uint64(self._experts)


def _scrambled(numbers: Array) -> Array:
    """Splitmix64: another number for each, all bits mixed; arithmetic is modulo 2**64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
