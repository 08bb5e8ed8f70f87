"""Which rows of which record make up a training sequence.

A key reads as its whole sequence: its ancestors' records and its own, in order. Where two cover
the same row, the earliest capture wins. What no record covers is missing, except for the one
row after the last captured: the last sampled token was never processed.
"""

from collections.abc import Sequence
from typing import NamedTuple

from serve_app.records import Record


class Run(NamedTuple):
    """``count`` rows from row ``source`` of a record, to row ``target``."""

    target: int
    segment: Record
    source: int
    count: int  # type: ignore[assignment]  # a tuple's own count is of no use here


Span = tuple[int, int]
"""The first of some rows, and how many."""


class Stitched(NamedTuple):
    """How to fill ``length`` rows: runs to copy, spans that are missing, and the tail.

    ``tail`` has the last row if it is the one that no engine captures.
    """

    length: int
    runs: Sequence[Run]
    missing: Sequence[Span] = ()
    tail: Sequence[Span] = ()

    @property
    def whole(self) -> Run | None:
        """The one run that covers all rows, if there is one."""
        return self.runs[0] if self.runs and self.runs[0].count == self.length else None

    def part(self, first: int, count: int) -> "Stitched":
        """Return how to fill ``count`` of the rows from ``first`` on."""
        runs: list[Run] = []
        for target, segment, source, rows in self.runs:
            for begin, kept in _within([(target, rows)], first, count):
                runs.append(Run(begin, segment, source + first + begin - target, kept))
        missing, tail = (_within(spans, first, count) for spans in (self.missing, self.tail))
        return Stitched(count, runs, missing, tail)


def stitch(segments: Sequence[Record], first: int, length: int) -> Stitched:
    """Cover the sequence's rows ``first .. first + length``; targets count from 0."""
    stop = first + length
    whole = segments[0].meta
    if len(segments) == 1 and whole.start <= first and stop <= whole.stop:
        # nearly every sequence
        return Stitched(length, (Run(0, segments[0], first - whole.start, length),))
    gaps, runs = [(first, stop)], list[Run]()
    for segment in segments:
        left: list[tuple[int, int]] = []
        for begin, end in gaps:
            here = max(segment.meta.start, begin), min(segment.meta.stop, end)
            if here[0] >= here[1]:
                left.append((begin, end))
                continue
            source = here[0] - segment.meta.start
            runs.append(Run(here[0] - first, segment, source, here[1] - here[0]))
            left += [gap for gap in ((begin, here[0]), (here[1], end)) if gap[0] < gap[1]]
        gaps = left
    captured = max(segment.meta.stop for segment in segments)
    tail: list[Span] = []
    if gaps and gaps[-1][1] == stop == captured + 1:
        begin, end = gaps.pop()
        gaps += [(begin, end - 1)] if begin < end - 1 else []
        tail = [(length - 1, 1)]
    return Stitched(length, runs, [(begin - first, end - begin) for begin, end in gaps], tail)


def _within(spans: Sequence[Span], first: int, count: int) -> list[Span]:
    """Cut spans to ``count`` rows from ``first`` on, and count from there."""
    cut = ((max(at, first), min(at + rows, first + count)) for at, rows in spans)
    return [(begin - first, end - begin) for begin, end in cut if begin < end]
