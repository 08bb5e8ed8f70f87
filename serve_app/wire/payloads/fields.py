"""Fields of a stranger's header: shape, position, dtype; checked before anything is allocated."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from serve_app.errors import RecordError
from serve_app.wire.payloads.refusal import no_rows, refusal, shown

Shape = tuple[int, int, int]


def read_int(value: object, name: str, low: int, high: int = 2**63 - 1) -> int:
    """Return an integer in ``[low, high]``; a bool is none."""
    if type(value) is not int or not low <= value <= high:
        raise refusal(f"{name} as an integer in [{low}, {high}]", value)
    return value


def read_shape(value: object) -> Shape:
    """Return a shape ``[rows, layers, top_k]``, none of them 0."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise refusal("shape as [rows, layers, top_k]", value)
    if type(value[0]) is int and not value[0]:
        raise no_rows(value)
    rows, layers, top_k = (read_int(size, "each size of shape", 1) for size in value)
    return rows, layers, top_k


def read_dtype(value: object, allowed: Collection[str]) -> np.dtype[Any]:
    """Return the little-endian dtype of an allowed name."""
    if not isinstance(value, str) or value not in allowed:
        raise refusal(f"dtype as one of {', '.join(allowed)}", value)
    return np.dtype(value).newbyteorder("<")


def read_object(payload: object, needed: Collection[str], allowed: Collection[str]) -> Any:
    """Return a payload that is an object with these fields and no others.

    A field that nobody here knows could change what the others mean.
    """
    if not isinstance(payload, Mapping):
        raise refusal(f"an object of {', '.join(needed)}", payload)
    if missing := [name for name in needed if name not in payload]:
        raise RecordError(f"expected an object of {', '.join(needed)}, {missing[0]} is missing")
    if len(payload) > len(allowed) or any(name not in allowed for name in payload):
        found = next(name for name in payload if name not in allowed)
        raise RecordError(f"expected an object of {', '.join(allowed)}, got {shown(found)} too")
    return payload
