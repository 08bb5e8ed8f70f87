"""Lay stitched rows out in an array: a single pass over the bytes, widening included."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.copying import Copies
from serve_app.assemble.stitch import Stitched
from serve_app.records import Record
from serve_app.types import BatchSpec

Array = npt.NDArray[Any]
Valid = npt.NDArray[np.bool_]
Block = tuple[slice, slice]
"""Columns of the batch, and the columns of a record that go there."""
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


def columns_of(layers: int, moe_layers: Sequence[int], spec: BatchSpec) -> tuple[int, ...]:
    """Return the global layers that a batch has, in order; ValueError for one that is not there."""
    chosen = range(layers) if spec.rank.layers is None else spec.rank.layers
    if unknown := [layer for layer in chosen if not 0 <= layer < layers]:
        raise ValueError(f"layers must be in [0, {layers}), got {unknown}")
    if spec.rank.dense_layers == "keep":
        return tuple(chosen)
    return tuple(layer for layer in chosen if layer in set(moe_layers))


def fill(
    ids: Array,
    valid: Valid,
    segments: Sequence[Record],
    plan: Stitched,
    blocks: Sequence[Block],
    padding: Padding,
    copies: Copies,
    at: int = 0,
) -> None:
    """Fill rows of one sequence, the padded batch's from ``at`` on.

    ``ids`` is ``[rows, columns, top_k]``, ``valid`` ``[rows]``.

    What records cover is only noted in ``copies``; it stands there after their ``run``.
    """
    for first, count in plan.missing:
        padding.fill(ids[first : first + count], valid[first : first + count], at + first)
    if plan.tail:
        padding.fill(ids[-1:], valid[-1:], at + len(ids) - 1)
    for run in plan.runs:
        segment, rows = segments[run.segment], slice(run.target, run.target + run.count)
        source = segment.ids[run.source : run.source + run.count]
        for target_columns, source_columns in blocks:
            copies.add(*_by_rows(ids[rows, target_columns], source[:, source_columns]))
        valid[rows] = True
        for row in segment.meta.invalid:
            if run.source <= row < run.source + run.count:
                valid[run.target + row - run.source] = False


def _by_rows(target: Array, source: Array) -> tuple[Array, Array]:
    """View each row ``[columns, top_k]`` as one element where no id is widened.

    Of rows with gaps between them numpy copies element by element: halves the time of a slice.
    """
    whole = source.flags.c_contiguous and target.flags.c_contiguous
    if whole or target.dtype != source.dtype:
        return target, source
    row = _row_of(source.dtype.itemsize * source.shape[1] * source.shape[2])
    return target.reshape(len(target), -1).view(row), source.reshape(len(source), -1).view(row)


@lru_cache
def _row_of(nbytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, nbytes))


def blocks_of(columns: Sequence[int]) -> list[Block]:
    """Group columns that stand next to each other in both arrays, so each copy is a large one."""
    blocks: list[Block] = []
    begin = 0
    for at in range(1, len(columns) + 1):
        if at == len(columns) or columns[at] != columns[at - 1] + 1:
            blocks.append((slice(begin, at), slice(columns[begin], columns[at - 1] + 1)))
            begin = at
    return blocks
