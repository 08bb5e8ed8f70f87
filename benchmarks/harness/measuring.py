"""Interleaved timing: every path once a round, so that a noisy moment falls on all of them.

A virtual machine that reports its free pages to its host gets each of them back at 10 times the
price of a page fault (100 MB: 285 ms instead of 15), once they were free for 2 s. So before each
run memory is touched and freed, and every path finds the same kind of free memory.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Path:
    """A way to do the work: ``run`` is timed on what ``prepare`` returned, which is not.

    A slow one takes part in one of ``every`` rounds only.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    every: int = 1


@dataclass(frozen=True, slots=True)
class Took:
    """What a path answers whose own processes held the clock, from the first start to the last end.

    So the calls that set them going count for nobody.
    """

    seconds: float

    @classmethod
    def over(cls, spans: Sequence[tuple[float, float]]) -> "Took":
        """Join (begin, end) of `time.perf_counter`, which all processes of a machine share."""
        return cls(max(end for _, end in spans) - min(begin for begin, _ in spans))


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one path, round by round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def summary(self) -> dict[str, float]:
        """Return what a report says of one path."""
        return {
            "median": round(self.median, 2),
            "min": round(min(self.rounds), 2),
            "rounds": len(self.rounds),
        }


@dataclass(frozen=True, slots=True)
class Target:
    """A figure's promise: a ratio of two paths' medians, and the bound it must keep."""

    name: str
    over: str
    under: str
    most: float | None = None
    least: float | None = None

    def judge(self, times: dict[str, Times]) -> dict[str, float | str | bool]:
        ratio = times[self.over].median / times[self.under].median
        if self.most is not None:
            bound, met = f"<= {self.most:g}", ratio <= self.most
        else:
            assert self.least is not None
            bound, met = f">= {self.least:g}", ratio >= self.least
        return {"ratio": round(ratio, 2), "target": bound, "met": met}


def interleaved(paths: Sequence[Path], repeat: int, touched_bytes: int) -> dict[str, Times]:
    """Time every path ``repeat`` times, each round starting at another path."""
    for path in paths:
        _once(path, 1)  # connections, imports and page tables are not what is compared
    rounds: dict[str, list[float]] = {path.name: [] for path in paths}
    for number in range(repeat):
        start = number % len(paths)
        for path in [*paths[start:], *paths[:start]]:
            if number % path.every == 0:
                rounds[path.name].append(_once(path, touched_bytes))
    return {path.name: Times(rounds[path.name]) for path in paths}


def _once(path: Path, touched_bytes: int) -> float:
    prepared = path.prepare()
    gc.collect()
    np.ones(touched_bytes, np.uint8)  # at once free again
    gc.disable()
    try:
        start = time.perf_counter()
        result = path.run(prepared)
        took = result.seconds if isinstance(result, Took) else time.perf_counter() - start
    finally:
        gc.enable()
    # Giving the result's memory back belongs to nobody's time.
    del result, prepared
    return took * 1e3
