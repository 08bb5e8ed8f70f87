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
_MOST_THREADS = 4


class Copies:
    """Copies noted now and done together by `run`, widening included; no two may overlap."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Array, Array]] = deque()
        self._nbytes = 0

    def add(self, target: Array, source: Array) -> None:
        """Note a copy of ``source`` to ``target``, arrays of one shape ``[rows, …]``."""
        nbytes = target.nbytes
        self._nbytes += nbytes
        if nbytes <= _PIECE_BYTES:
            self._waiting.append((target, source))
            return
        rows = max(1, len(target) * _PIECE_BYTES // nbytes)
        for at in range(0, len(target), rows):
            self._waiting.append((target[at : at + rows], source[at : at + rows]))

    def run(self) -> None:
        """Copy everything noted; raise numpy's error if a source does not fit its target."""
        helpers = min(_MOST_THREADS, len(os.sched_getaffinity(0))) - 1
        if self._nbytes < _WORTH_BYTES or not helpers:
            self._work()
            return
        with ThreadPoolExecutor(helpers, thread_name_prefix="r3serve-copy") as threads:
            helping = [threads.submit(self._work) for _ in range(helpers)]
            self._work()
            for done in helping:
                done.result()

    def _work(self) -> None:
        # A deque hands each copy to one thread, and numpy lets go of the interpreter meanwhile.
        while True:
            try:
                target, source = self._waiting.popleft()
            except IndexError:
                return
            np.copyto(target, source, casting="safe")
