"""Where a batch's ids go: an array that the caller has, or a new one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.types import OutputDtype

Array = npt.NDArray[Any]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
"""Makes an array of a shape and dtype; what is in it does not matter."""


def destination(
    out: Array | None,
    shape: tuple[int, ...],
    stored: np.dtype[Any],
    asked: OutputDtype | None,
    allocate: Allocate,
) -> Array:
    """Return ``out`` if it fits, or a new array; RecordError for a dtype that is too narrow."""
    dtype = np.dtype(asked) if asked else stored
    if not np.can_cast(stored, dtype, "safe"):
        raise RecordError(f"{dtype} cannot hold every id stored as {stored}")
    if out is None:
        return allocate(shape, dtype)
    usable = out.flags.c_contiguous and out.flags.writeable
    if out.shape != shape or out.dtype != dtype or not usable:
        raise ValueError(
            f"out must be a writable {dtype}{list(shape)}, got {out.dtype}{list(out.shape)}"
        )
    return out
