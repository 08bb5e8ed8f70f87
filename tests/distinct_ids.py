"""Expert ids as a router gives them: no expert twice in a row and layer."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt


def distinct_ids(shape: tuple[int, int, int], experts: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return ids ``[rows, layers, top_k]``, the same ones for the same seed.

    Each row and layer begins anywhere and goes on in steps that meet every expert once. Of one
    seed, fewer rows are the first of more.
    """
    rows, layers, top_k = shape
    if top_k > experts:
        raise ValueError(f"expected a top_k of at most {experts} experts, got {top_k}")
    steps, count = _steps(experts), np.uint32(experts)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(experts * len(steps), size=(rows, layers), dtype=np.uint32)
    step, now = steps[drawn // count], drawn % count
    ids = np.empty(shape, np.int64)
    for slot in range(top_k):
        ids[..., slot] = now
        now = (now + step) % count
    return ids


@lru_cache
def _steps(experts: int) -> npt.NDArray[np.uint32]:
    """Return the steps that have no divisor with the number of experts in common."""
    steps = np.arange(1, experts + 1, dtype=np.uint32)
    coprime: npt.NDArray[np.uint32] = steps[np.gcd(steps, np.uint32(experts)) == 1]
    return coprime
