"""Waiting for what nobody announces."""

import time
from collections.abc import Callable

_TICK_S = 0.05


def eventually(true: Callable[[], bool], within_s: float = 30.0) -> bool:
    """Return True as soon as it is true, False where it is not in time; it blocks."""
    ends = time.monotonic() + within_s
    while not true():
        if time.monotonic() > ends:
            return False
        time.sleep(_TICK_S)
    return True
