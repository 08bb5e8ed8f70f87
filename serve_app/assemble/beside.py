"""What a batch says of its rows beside their routes: the weights' version, and the tokens."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.records import UNKNOWN, Record
from serve_app.types import PackedExperts


class Beside:
    """Values of a batch's rows ``[rows]``, filled as their routes are.

    Versions are few: a row has the number of its own in ``versions``, and number 0 where it has
    none (`PackedExperts.valid` tells).
    """

    def __init__(self, rows: int, versions: Iterable[int], tokens: bool) -> None:
        self.versions = tuple(sorted(set(versions)))
        narrow = np.min_scalar_type(max(0, len(self.versions) - 1))
        self.version_of: npt.NDArray[Any] = np.zeros(rows, narrow)
        self.tokens = np.full(rows, UNKNOWN, np.int32) if tokens else None
        self._numbers = {version: number for number, version in enumerate(self.versions)}

    @property
    def is_alike(self) -> bool:
        """Whether it is the same of all rows, so that `copy` has nothing to do."""
        return len(self.versions) <= 1 and self.tokens is None

    def copy(self, begin: int, segment: Record, source: int, count: int) -> None:
        """Fill ``count`` rows from ``begin`` on with those of a record from row ``source`` on."""
        here = slice(begin, begin + count)
        if number := self._numbers[segment.meta.weight_version]:
            self.version_of[here] = number
        if self.tokens is not None and (known := segment.tokens) is not None:
            self.tokens[here] = known[source : source + count]

    def take(self, here: slice, batch: PackedExperts, there: slice) -> None:
        """Fill rows with some of another batch's."""
        if len(self.versions) > 1:
            numbers = [self._numbers[version] for version in batch.versions] or [0]
            renumbered = np.array(numbers, self.version_of.dtype)
            self.version_of[here] = renumbered[batch.version_of[there]]
        if self.tokens is not None and batch.tokens is not None:
            self.tokens[here] = batch.tokens[there]
