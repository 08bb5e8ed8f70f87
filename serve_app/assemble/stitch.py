"""Which rows of which record make up a training sequence.

A key reads as its whole sequence: its ancestors' records and its own, in order. Where two cover
the same row, the earliest capture wins. What no record covers is missing, except for the one
row after the last captured: the last sampled token was never processed.
"""

from collections.abc import Sequence
from typing import NamedTuple

from serve_app.records import Record


class Run(NamedTuple):
    """``count`` rows from row ``source`` of record ``segment``, to row ``target``."""

    target: int
    segment: int
    source: int
    count: int  # type: ignore[assignment]  # a tuple's own count is of no use here


class Stitched(NamedTuple):
    """How to fill ``length`` rows: runs to copy, and the spans (first, count) left missing.

    ``tail`` is 1 when the last row is the one that no engine captures.
    """

    runs: list[Run]
    missing: list[tuple[int, int]]
    tail: int


def stitch(segments: Sequence[Record], first: int, length: int) -> Stitched:
    """Cover the sequence's rows ``first .. first + length``; targets count from 0."""
    stop = first + length
    whole = segments[0].meta
    if len(segments) == 1 and whole.start <= first and stop <= whole.stop:
        return Stitched([Run(0, 0, first - whole.start, length)], [], 0)  # nearly every sequence
    gaps, runs = [(first, stop)], list[Run]()
    for index, segment in enumerate(segments):
        left: list[tuple[int, int]] = []
        for begin, end in gaps:
            here = max(segment.meta.start, begin), min(segment.meta.stop, end)
            if here[0] >= here[1]:
                left.append((begin, end))
                continue
            source = here[0] - segment.meta.start
            runs.append(Run(here[0] - first, index, source, here[1] - here[0]))
            left += [gap for gap in ((begin, here[0]), (here[1], end)) if gap[0] < gap[1]]
        gaps = left
    captured = max(segment.meta.stop for segment in segments)
    tail = int(bool(gaps) and gaps[-1][1] == stop == captured + 1)
    if tail:
        begin, end = gaps.pop()
        gaps += [(begin, end - 1)] if begin < end - 1 else []
    return Stitched(runs, [(begin - first, end - begin) for begin, end in gaps], tail)
