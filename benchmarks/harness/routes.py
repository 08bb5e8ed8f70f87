"""Random routes, quickly: no expert twice in a row and layer, as a router gives them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.records import Ids, narrowest_dtype


def random_routes(
    shape: tuple[int, int, int], experts: int, seed: int | np.random.Generator = 0
) -> Ids:
    """Return ids ``[rows, layers, top_k]`` in the dtype in which they are stored.

    Each row and layer begins anywhere and goes on in steps that meet every expert once. Nothing
    but the ids has all slots.
    """
    rows, layers, top_k = shape
    if top_k > experts:
        raise ValueError(f"expected top_k of at most {experts} experts, got {top_k}")
    rng, dtype = np.random.default_rng(seed), narrowest_dtype(experts)
    wide = np.dtype(np.uint16 if dtype == np.uint8 else np.uint32)  # for the sum of two ids
    steps = _steps(experts, wide)
    step = steps[rng.integers(len(steps), size=(rows, layers), dtype=wide)]
    now = rng.integers(experts, size=(rows, layers), dtype=wide)
    ids: Ids = np.empty(shape, dtype)
    for slot in range(top_k):
        ids[..., slot] = now
        now += step
        now %= experts
    return ids


def _steps(experts: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the steps that have no divisor with the number of experts in common."""
    steps = np.arange(1, experts + 1)
    coprime: npt.NDArray[Any] = steps[np.gcd(steps, experts) == 1].astype(dtype)
    return coprime
