"""Rows that were never routed: a real choice never has an expert twice.

Peers fill rows that they lack with zeros, and whatever is left in a buffer. Within a row and a MoE
layer a router's top-k holds different experts, so a row with a repetition is none of its choices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.records.ids import Rows

_CELLS_AT_ONCE = 1 << 16


def repeating_rows(ids: npt.NDArray[Any], moe_layers: Sequence[int]) -> Rows:
    """Return bool ``[rows]``: some MoE layer of the row has an expert twice.

    ``ids`` are ``[rows, layers, top_k]``.
    """
    chosen = ids if len(moe_layers) == ids.shape[1] else ids[:, list(moe_layers)]
    rows, layers, top_k = chosen.shape
    cells = np.zeros(rows * layers, np.bool_)
    flat = chosen.reshape(-1, top_k)
    for first in range(0, len(flat), _CELLS_AT_ONCE):
        stop = first + _CELLS_AT_ONCE
        slots, some = np.ascontiguousarray(flat[first:stop].T), cells[first:stop]
        for one in range(top_k - 1):
            for other in range(one + 1, top_k):
                some |= slots[one] == slots[other]
    by_layer = cells.reshape(rows, layers)
    return np.asarray(by_layer.any(axis=1))


def repeating_rows_of_ours(ids: npt.NDArray[Any], moe_layers: Sequence[int]) -> Rows:
    """Do as `repeating_rows` for what an engine of ours recorded, at a fraction of the work.

    It writes whole rows into blank memory, so a row that it missed is blank in every layer, and a
    layer that it missed in every row. All rows are looked at where the first MoE layer's first two
    ids stand, and the first, the middle and the last row as a whole; what is blank there is looked
    at like anybody's.
    """
    rows, _, top_k = ids.shape
    if top_k == 1:
        return np.zeros(rows, np.bool_)
    if repeating_rows(ids[sorted({0, rows // 2, rows - 1})], moe_layers).any():
        return repeating_rows(ids, moe_layers)
    first = moe_layers[0]
    repeats: Rows = ids[:, first, 0] == ids[:, first, 1]
    if repeats.any():
        repeats[repeats] = repeating_rows(ids[repeats], moe_layers)
    return repeats


def what_it_looks_like(ids: npt.NDArray[Any]) -> str:
    """Say in a few words what an array without one real row holds."""
    first = ids.reshape(-1)[0]
    if (ids == first).all():
        return "all zeros" if not first else f"all {first}"
    return "a repeated expert in every row"
