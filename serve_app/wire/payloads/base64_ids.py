"""Arrays as base64 of their C-order, little-endian bytes."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.wire.payloads.refusal import refusal


def read_bytes(text: object) -> bytes:
    """Return the bytes of a strict base64 text."""
    if not isinstance(text, str):
        raise refusal("base64 text", text)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RecordError(f"expected base64 text of {len(text)} characters, got {error}") from None


def read_ids(text: object, dtype: np.dtype[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
    """Return an array of exactly ``shape``; refused before decoding if the text is not its size."""
    promised = math.prod(shape) * dtype.itemsize
    if isinstance(text, str) and len(text) != -(-promised // 3) * 4:
        raise RecordError(
            f"expected {promised} bytes of {dtype}{list(shape)} as base64,"
            f" got {len(text)} characters"
        )
    raw = read_bytes(text)
    if len(raw) != promised:
        raise RecordError(
            f"expected {promised} bytes of {dtype}{list(shape)} in base64, got {len(raw)}"
        )
    return np.frombuffer(raw, dtype).reshape(shape)


def write_ids(ids: npt.NDArray[Any], dtype: npt.DTypeLike) -> str:
    """Return the base64 of ids as ``dtype``, which must hold them."""
    little = np.dtype(dtype).newbyteorder("<")
    return base64.b64encode(np.ascontiguousarray(ids, little).tobytes()).decode()
