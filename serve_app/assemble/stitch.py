"""Which rows of which record make up a training sequence.

A key reads as its whole sequence: its ancestors' records and its own, in order. Where two cover
the same row, the earliest capture wins. What no record covers is missing, except for the one
row after the last captured: the last sampled token was never processed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.records import Record


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` rows from row ``source`` of record ``segment``, to row ``target``."""

    target: int
    segment: int
    source: int
    count: int


@dataclass(frozen=True, slots=True)
class Stitched:
    """How to fill ``length`` rows: runs to copy, and the spans (first, count) left missing.

    ``tail`` is 1 when the last row is the one that no engine captures.
    """

    runs: list[Run]
    missing: list[tuple[int, int]]
    tail: int


def stitch(segments: Sequence[Record], first: int, length: int) -> Stitched:
    """Cover the sequence's rows ``first .. first + length``; targets count from 0."""
    stop = first + length
    at, runs, missing = first, list[Run](), list[tuple[int, int]]()
    for index, segment in enumerate(segments):
        begin, end = max(segment.meta.start, at), min(segment.meta.stop, stop)
        if begin >= end:
            continue
        if begin > at:
            missing.append((at - first, begin - at))
        runs.append(Run(begin - first, index, begin - segment.meta.start, end - begin))
        at = end
    captured = max(segment.meta.stop for segment in segments)
    tail = int(stop == captured + 1 and at == stop - 1)
    if at < stop - tail:
        missing.append((at - first, stop - tail - at))
    return Stitched(runs, missing, tail)
