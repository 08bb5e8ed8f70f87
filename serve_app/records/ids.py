"""Expert ids as they are stored: their width, and what seals their bytes."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from serve_app.errors import RecordError

Ids = npt.NDArray[np.unsignedinteger[Any]]
Rows = npt.NDArray[np.bool_]

MAX_EXPERTS = 65_535


def narrowest_dtype(num_experts: int) -> np.dtype[Any]:
    """Return uint8 up to 256 experts, uint16 up to 65,535."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise RecordError(f"num_experts must be in [1, {MAX_EXPERTS}], got {num_experts}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@lru_cache(maxsize=256)
def one_tuple(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return one and the same tuple for all equal ones; pickle writes it once, too."""
    return layers


def checksum(values: npt.NDArray[Any]) -> int:
    """Return xxh3-64 over an array's C-order bytes."""
    flat = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return int(xxhash.xxh3_64_intdigest(flat.data))
