"""Lifetimes of numbered records: a wheel of one-second buckets. No Ray, no clock of its own.

A record sits in one bucket. Renewing only writes its new end; the sweep that opens the old
bucket moves it on. So a renewal costs one store, and a sweep what ended or moved.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator

_ENDED = -1.0


class Leases:
    """Ends of leases by sequence number; numbers are added in ascending order without gaps."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self._ends = array("d")
        self._buckets: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))

    def add(self, seq: int, end: float) -> None:
        """Start the lease of the next sequence number, until ``end`` (seconds)."""
        assert seq == self.first + len(self._ends)
        self._ends.append(end)
        self._buckets[math.ceil(end)].append(seq)

    def renew(self, seq: int, end: float) -> None:
        """Move a live lease's end, later or earlier."""
        if math.ceil(end) < math.ceil(self._ends[seq - self.first]):
            self._buckets[math.ceil(end)].append(seq)
        self._ends[seq - self.first] = end

    def end(self, seq: int) -> None:
        """Forget a lease that ended otherwise."""
        self._ends[seq - self.first] = _ENDED

    def sweep(self, now: float) -> Iterator[int]:
        """Yield each sequence number whose lease is over, once; its lease is then ended."""
        for second in sorted(second for second in self._buckets if second <= now):
            for seq in self._buckets.pop(second):
                if seq < self.first or (end := self._ends[seq - self.first]) == _ENDED:
                    continue
                if end > now:
                    self._buckets[math.ceil(end)].append(seq)
                    continue
                self._ends[seq - self.first] = _ENDED
                yield seq

    def trim(self, first: int) -> None:
        """Forget everything before ``first``, none of which is live."""
        del self._ends[: first - self.first]
        self.first = first
