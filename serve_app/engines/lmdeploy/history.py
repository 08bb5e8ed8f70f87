"""A sequence's rows in LMDeploy's hands, of which those of decode steps may still wait.

LMDeploy cuts every step's array into one row a sequence and appends each to that sequence's own:
64 sequences, 64 appends a step, and every 64 rows each of them copies all that it has. Here a
step's array stays whole, and whoever looks at a sequence's rows puts those that wait in their
place first. So what LMDeploy finds is what it would have found.
"""

from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
from lmdeploy.pytorch.messages import HistoryRouterExperts, MessageStatus

from serve_app.records import Ids

MOST_WAITING = 64
"""Rows of a sequence that wait at most: what waits holds whole steps, of its neighbours too."""

_GROWTH = 1.5
_MOST_ROOM = 4096


class Steps:
    """The rows of successive decode steps of the same sequences, ``[sequences, ...]`` a step.

    ``places`` says which of them is whose, by the identity of its history; ``later`` are the steps
    of other sequences after these. Nobody holds steps from the front but those that wait for them.
    """

    __slots__ = ("arrays", "later", "places")

    def __init__(self, histories: list["RowHistory | None"]) -> None:
        self.arrays: list[Ids] = []
        self.places = {id(one): place for place, one in enumerate(histories) if one is not None}
        self.later: Steps | None = None


class RowHistory(HistoryRouterExperts):  # type: ignore[misc]  # lmdeploy is untyped
    """Rows ``[rows, layers, top_k]`` of one sequence, the earliest capture of each.

    There is room for ``more`` behind the first ones, so that memory is taken once. What `shown`
    returns may be looked at once `settle` was called, and stays right then.
    """

    _data: Any
    _num_real: int

    def __init__(
        self, expert_ids: Ids | None = None, dtype: Any = np.uint16, more: int = MOST_WAITING
    ) -> None:
        super().__init__(expert_ids, dtype)
        self._more = min(more, _MOST_ROOM)
        self._steps: Steps | None = None
        self._taken = 0  # of the first steps that wait
        self.kept: Ids | None = None
        self.whole = False  # it was shown all there are, and no token came without its row since

    def __len__(self) -> int:
        return self._num_real + self.waiting

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        steps, count = self._steps, -self._taken if self._steps else 0
        while steps is not None:
            if id(self) in steps.places:
                count += len(steps.arrays)
            steps = steps.later
        return count

    def follow(self, steps: Steps) -> None:
        """Take rows from ``steps`` on, unless it does already."""
        if self._steps is None:
            self._steps, self._taken = steps, 0

    def leave(self) -> None:
        """Take no more rows."""
        self.settle()
        self._steps, self._taken = None, 0

    def settle(self) -> None:
        """Put the rows that wait in their place."""
        steps, taken, start = self._steps, self._taken, self._num_real
        if steps is None:
            return
        while True:
            place = steps.places.get(id(self))
            if place is not None:
                for array in steps.arrays[taken:]:
                    self._add(array[place])
            if steps.later is None:
                break
            steps, taken = steps.later, 0
        self._steps = steps
        self._taken = len(steps.arrays) if id(self) in steps.places else 0
        if self._num_real > start:
            self._restore(start)

    def shown(self, end: int) -> npt.NDArray[Any] | None:
        """Return the first ``end`` rows, which are there only once they are settled."""
        if self.whole and 0 < end <= len(self._data):
            return self._data[:end]  # type: ignore[no-any-return]
        count = len(self)
        if not 0 < end <= count:
            return None
        self.whole = end == count
        self.settle()
        self.reserve(end)
        return self._data[:end]  # type: ignore[no-any-return]

    def miss(self) -> None:
        """Note that a token came without its row."""
        self.whole = False

    def keep(self) -> None:
        """Keep the rows there are: they win over those that are captured in their place later."""
        captured = self.get_real().copy()
        if self.kept is not None:
            both = min(len(captured), len(self.kept))
            captured[:both] = self.kept[:both]
        if self.kept is None or len(captured) > len(self.kept):
            self.kept = captured

    def get_real(self) -> Any:
        """Return all rows."""
        self.settle()
        return super().get_real()

    def append(self, new_data: Any) -> None:
        """Add rows after all others."""
        self.settle()
        self.whole = False
        if self._data is None:
            self._data = self._room(len(new_data) + self._more, new_data.shape[1:])
        start = self._num_real
        super().append(new_data)
        self._restore(start)

    def resize(self, size: int) -> None:
        """Forget all rows but the first ``size``."""
        self.settle()
        self.whole = False
        super().resize(size)

    def reserve(self, size: int) -> None:
        """Make room for ``size`` rows; LMDeploy grows by 64, and copies all of them every time."""
        if self._data is None or len(self._data) >= size:
            return
        room = self._room(max(size, int(len(self._data) * _GROWTH)), self._data.shape[1:])
        room[: self._num_real] = self._data[: self._num_real]
        self._data = room

    def _add(self, row: Ids) -> None:
        """Add one row, into the memory of views that were shown as long as there is room."""
        if self._data is None:
            self._data = self._room(1 + self._more, row.shape)
        elif self._num_real == len(self._data):
            self.reserve(self._num_real + 1)
        self._data[self._num_real] = row
        self._num_real += 1

    def _room(self, rows: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return np.empty((rows, *shape), self.dtype)

    def _restore(self, start: int) -> None:
        """Let kept rows win over those that were added from ``start`` on."""
        if self.kept is None:
            return
        stop = min(self._num_real, len(self.kept))
        if start < stop:
            self._data[start:stop] = self.kept[start:stop]
        if stop == len(self.kept):
            self.kept = None


class Backlog:
    """Has the rows of decode steps wait for the sequences that they are of."""

    def __init__(self) -> None:
        self._running: list[Any] = []
        self._states: list[Any] = []
        self._histories: list[RowHistory | None] = []
        self._steps = Steps([])
        self._added = 0

    def add(self, running: list[Any], rows: Ids) -> None:
        """Take a step's rows ``[sequences, layers, top_k]``, one a sequence in its place.

        A sequence that has ended may be in a step still: its row is nobody's.
        """
        if len(rows) != len(running):
            raise RuntimeError(
                f"expected the routes of {len(running)} tokens of a decode step, got {len(rows)}"
            )
        # Any change of a sequence's status is another object.
        states = [sequence._state for sequence in running]
        if not (_same(states, self._states) and _same(running, self._running)):
            self._running, self._states = list(running), states
            self._histories = [_follows(sequence) for sequence in running]
            self._begin()
        elif len(self._steps.arrays) >= MOST_WAITING:
            self._begin()
        self._steps.arrays.append(rows)  # its memory is a step's own, and nobody writes there again
        self._added += 1
        if self._added % MOST_WAITING == 0:
            for history in self._histories:
                if history is not None:
                    history.settle()

    def skip(self) -> None:
        """Note that a step came without rows."""
        for history in self._histories:
            if history is not None:
                history.miss()
        self.clear()

    def clear(self) -> None:
        """Let go of all sequences."""
        self._running, self._states, self._histories = [], [], []
        self._begin()

    def _begin(self) -> None:
        self._steps.later = steps = Steps(self._histories)
        self._steps = steps
        for history in self._histories:
            if history is not None:
                history.follow(steps)


def _follows(sequence: Any) -> RowHistory | None:
    """Return the history that this sequence's row belongs to."""
    if sequence.status is not MessageStatus.RUNNING or not sequence.return_routed_experts:
        return None
    history: RowHistory = sequence.all_routed_experts
    return history


def _same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(map(is_, ones, others))
