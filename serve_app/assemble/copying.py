"""Many copies at once: memory is faster than one core, and new pages cost more than the bytes."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_WORTH_BYTES = 8 << 20
"""Below this, starting threads costs more than they save."""
_PIECE_BYTES = 4 << 20
_SHORT_BYTES = 256 << 10
_GATHERED_BYTES = 2 << 20
_MOST_THREADS = 4
KEPT_ELEMENTS = 500
"""Of so few elements and fewer numpy copies without letting other threads run Python."""

Copy = tuple[Array, list[Array]]
"""Rows of a target, and the sources that fill them one after the other."""


class Copies:
    """Copies noted first and then done together by `run`, once; no two may overlap."""

    def __init__(self) -> None:
        self._helpers = min(_MOST_THREADS, len(os.sched_getaffinity(0))) - 1
        self._targets: list[Target] = []

    def into(self, array: Array) -> "Target":
        """Return what takes notes of the copies to one array."""
        self._targets.append(Target(array))
        return self._targets[-1]

    def shared(self, nbytes: int) -> bool:
        """Whether several threads would do so many bytes."""
        return bool(self._helpers) and nbytes >= _WORTH_BYTES

    def run(self) -> None:
        """Copy everything noted; raise numpy's error if a source does not fit its target."""
        copies = deque(copy for target in self._targets for copy in target.copies())
        if not self.shared(sum(target.nbytes for target, _ in copies)):
            _work(copies)
            return
        with ThreadPoolExecutor(self._helpers, thread_name_prefix="r3serve-copy") as threads:
            helping = [threads.submit(_work, copies) for _ in range(self._helpers)]
            _work(copies)
            for done in helping:
                done.result()


def _work(copies: deque[Copy]) -> None:
    # A deque hands each copy to one thread, and numpy lets go of the interpreter meanwhile.
    while True:
        try:
            target, sources = copies.popleft()
        except IndexError:
            return
        if len(sources) == 1:
            np.copyto(target, sources[0], casting="safe")
        else:
            np.concatenate(sources, out=target, casting="safe")


class Target:
    """What goes to one array ``[rows, …]``. Short sources that follow each other are one copy.

    Between short copies threads would spend their time waiting for the interpreter.
    """

    def __init__(self, array: Array) -> None:
        self._array = array
        self._row_bytes = max(1, array[:1].nbytes)
        self._copies: list[Copy] = []
        self._begin = self._stop = 0
        self._gathered: list[Array] = []

    def add(self, begin: int, source: Array) -> None:
        """Note that ``source`` ``[rows, …]`` goes to the rows from ``begin`` on."""
        rows = len(source)
        if rows * self._row_bytes > _SHORT_BYTES:
            self._add_long(begin, source)
            return
        nbytes = (self._stop - self._begin) * self._row_bytes
        if begin != self._stop or nbytes > _GATHERED_BYTES:
            self._close()
            self._begin = begin
        self._stop = begin + rows
        self._gathered.append(source)

    def copies(self) -> list[Copy]:
        """Return what was noted."""
        self._close()
        return self._copies

    def _add_long(self, begin: int, source: Array) -> None:
        stretch = max(1, _PIECE_BYTES // self._row_bytes)
        for at in range(0, len(source), stretch):
            piece = source[at : at + stretch]
            here = slice(begin + at, begin + at + len(piece))
            self._copies.append((self._array[here], [piece]))

    def _close(self) -> None:
        if self._gathered:
            self._copies.append((self._array[self._begin : self._stop], self._gathered))
        self._gathered = []
