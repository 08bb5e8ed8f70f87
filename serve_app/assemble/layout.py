"""Lay stitched rows out in an array: a single pass over the bytes, widening included."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.beside import Beside
from serve_app.assemble.copying import KEPT_ELEMENTS, Copies, Target
from serve_app.assemble.padding import Padding
from serve_app.assemble.stitch import Stitched
from serve_app.records import Record, RecordMeta
from serve_app.types import BatchSpec

Array = npt.NDArray[Any]
Valid = npt.NDArray[np.bool_]
Block = tuple[slice, slice]
"""Columns of the batch, and the columns of a record that go there."""


class Filling:
    """A batch ``[rows, columns, top_k]`` of stored or wider ids, and its ``valid`` ``[rows]``.

    ``valid`` is all True to begin with. What records cover is only noted in ``copies``; it stands
    there after their ``run``. A piece of a sequence should cost little whatever its size, so
    views are made once a batch and once a record, and a piece is two slices of them. There are
    about ``pieces`` of them. ``beside`` is filled with the same rows' other values.
    """

    def __init__(
        self,
        ids: Array,
        valid: Valid,
        columns: Sequence[int],
        model: RecordMeta,
        padding: Padding,
        copies: Copies,
        pieces: int = 1,
        beside: Beside | None = None,
    ) -> None:
        self._ids = ids
        self._valid = valid
        self._padding = padding
        self._beside = beside
        self._native: list[tuple[int, int]] = []
        self.unrouted = 0
        self._blocks = blocks_of(columns)
        whole = len(self._blocks) == 1 and len(columns) == model.layers
        short = copies.shared(ids.nbytes) and len(ids) <= KEPT_ELEMENTS * pieces
        self._by_id = whole or short or ids.dtype != model.dtype or not ids.size
        self._targets = [copies.into(self._rows(ids[:, block])) for block, _ in self._blocks]
        self._read: Record | None = None
        self._pairs: list[tuple[Target, Array]] = []

    def pad(self, begin: int, count: int, at: int) -> None:
        """Fill ``count`` rows that no record has, numbered from ``at`` on."""
        here = slice(begin, begin + count)
        self._padding.fill(self._ids[here], self._valid[here], at)

    def fill(self, begin: int, plan: Stitched, at: int = 0) -> None:
        """Fill rows of one sequence from ``begin`` on, numbered from ``at`` on."""
        for first, count in (*plan.missing, *plan.tail):
            self.pad(begin + first, count, at + first)
        for target, segment, source, count in plan.runs:
            self.copy(begin + target, segment, source, count, at + target)

    @property
    def native(self) -> int:
        """How many rows records themselves call invalid; ``unrouted`` of them nobody routed."""
        return len(self._native)

    def pad_native(self) -> None:
        """Fill those with the ids of padding; after the copies ran."""
        for row, at in self._native:
            self.pad(row, 1, at)

    def copy(self, begin: int, segment: Record, source: int, count: int, at: int = 0) -> None:
        """Note ``count`` rows from row ``source`` of a record, for the rows from ``begin`` on.

        They are numbered from ``at`` on.
        """
        if segment is not self._read:
            sources = (self._rows(segment.ids[:, block]) for _, block in self._blocks)
            self._pairs = list(zip(self._targets, sources, strict=True))
            self._read = segment
        end = source + count
        for target, rows in self._pairs:
            target.add(begin, rows[source:end])
        if self._beside is not None:
            self._beside.copy(begin, segment, source, count)
        if segment.meta.invalid:
            self._leave_native(begin, segment.meta, source, end, at)

    def _leave_native(self, begin: int, meta: RecordMeta, source: int, end: int, at: int) -> None:
        """Mark those of the rows ``source .. end`` that a record itself calls invalid."""
        self.unrouted += sum(source <= row < end for row in meta.unrouted_rows)
        for row in meta.invalid:
            if source <= row < end:
                self._valid[begin + row - source] = False
                self._native.append((begin + row - source, at + row - source))

    def _rows(self, ids: Array) -> Array:
        """View each row ``[columns, top_k]`` as one element where no id is widened.

        Of rows with gaps between them numpy copies element by element: halves the time of a
        slice. Short pieces that several threads copy are left: see `KEPT_ELEMENTS`.
        """
        if self._by_id:
            return ids
        row = _row_of(ids.dtype.itemsize * ids.shape[1] * ids.shape[2])
        return ids.reshape(len(ids), -1).view(row)


@lru_cache
def _row_of(nbytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, nbytes))


def columns_of(layers: int, moe_layers: Sequence[int], spec: BatchSpec) -> tuple[int, ...]:
    """Return the global layers that a batch has, in order; ValueError for one that is not there."""
    chosen = range(layers) if spec.rank.layers is None else spec.rank.layers
    if unknown := [layer for layer in chosen if not 0 <= layer < layers]:
        raise ValueError(f"layers must be in [0, {layers}), got {unknown}")
    if spec.rank.dense_layers == "keep":
        return tuple(chosen)
    return tuple(layer for layer in chosen if layer in set(moe_layers))


def blocks_of(columns: Sequence[int]) -> list[Block]:
    """Group columns that stand next to each other in both arrays, so each copy is a large one."""
    blocks: list[Block] = []
    begin = 0
    for at in range(1, len(columns) + 1):
        if at == len(columns) or columns[at] != columns[at - 1] + 1:
            blocks.append((slice(begin, at), slice(columns[begin], columns[at - 1] + 1)))
            begin = at
    return blocks
