"""Copy stitched rows into an array: a single pass over the bytes, widening included."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.stitch import Stitched
from serve_app.records import Record
from serve_app.types import BatchSpec

Array = npt.NDArray[Any]
Valid = npt.NDArray[np.bool_]
Block = tuple[slice, slice]
"""Columns of the batch, and the columns of a record that go there."""


class Padding:
    """Fills rows that no record covers with the ids that a batch's pad policy asks for."""

    def __init__(self, spec: BatchSpec, num_experts: int) -> None:
        self._policy = spec.pad
        self._experts = num_experts
        self._random = np.random.default_rng(spec.pad_seed)

    def fill(self, ids: Array, valid: Valid) -> None:
        """Fill ``ids`` ``[rows, layers, top_k]``; all of them are invalid, whatever the ids."""
        valid[:] = False
        if self._policy == "mask":
            ids[:] = 0
        elif self._policy == "random":
            ids[:] = self._random.integers(0, self._experts, ids.shape)
        else:
            rows, _, top_k = ids.shape
            ids[:] = (np.arange(rows * top_k).reshape(rows, 1, top_k)) % self._experts


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
) -> None:
    """Fill rows of one sequence: ``ids`` ``[rows, columns, top_k]``, ``valid`` ``[rows]``."""
    for first, count in plan.missing:
        padding.fill(ids[first : first + count], valid[first : first + count])
    if plan.tail:
        padding.fill(ids[-1:], valid[-1:])
    for run in plan.runs:
        segment, rows = segments[run.segment], slice(run.target, run.target + run.count)
        source = segment.ids[run.source : run.source + run.count]
        for target_columns, source_columns in blocks:
            np.copyto(ids[rows, target_columns], source[:, source_columns], casting="safe")
        valid[rows] = True
        for row in segment.meta.invalid:
            if run.source <= row < run.source + run.count:
                valid[run.target + row - run.source] = False


def blocks_of(columns: Sequence[int]) -> list[Block]:
    """Group columns that stand next to each other in both arrays, so each copy is a large one."""
    blocks: list[Block] = []
    begin = 0
    for at in range(1, len(columns) + 1):
        if at == len(columns) or columns[at] != columns[at - 1] + 1:
            blocks.append((slice(begin, at), slice(columns[begin], columns[at - 1] + 1)))
            begin = at
    return blocks
