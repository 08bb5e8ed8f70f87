"""Copy stitched rows into one packed array: a single pass over the bytes, widening included."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.stitch import Stitched
from serve_app.records import Record

Array = npt.NDArray[Any]


def cumulative(lengths: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return the boundaries ``[sequences + 1]`` of packed sequences."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def fill(
    ids: Array,
    valid: npt.NDArray[np.bool_],
    segments: Sequence[Record],
    plan: Stitched,
) -> None:
    """Fill one sequence's rows: ``ids`` ``[length, layers, top_k]``, ``valid`` ``[length]``.

    Rows without a source get id 0 and ``valid=False``.
    """
    for first, count in plan.missing:
        ids[first : first + count] = 0
        valid[first : first + count] = False
    if plan.tail:
        ids[-1] = 0
        valid[-1] = False
    for run in plan.runs:
        segment, rows = segments[run.segment], slice(run.target, run.target + run.count)
        np.copyto(ids[rows], segment.ids[run.source : run.source + run.count], casting="safe")
        valid[rows] = True
        for row in segment.meta.invalid:
            if run.source <= row < run.source + run.count:
                valid[run.target + row - run.source] = False
