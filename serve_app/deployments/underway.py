"""Answers by reference that their callers may not have taken yet."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray

_KEEP_S = 5.0
_MOST_BYTES = 512 << 20


class Underway:
    """Keeps the newest answers alive, each for 5 s, and 512 MiB of them in all.

    Serve sends an answer as an item of a stream. Ray may ask the caller whether it needs the object
    that the item refers to before the item is there, hear no, and delete it (seen in 2.58.1 when
    many calls ran at once). A caller whose answer is gone all the same asks again.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[ray.ObjectRef[Any], int]] = deque()
        self._nbytes = 0
        self._dropped = 0

    def keep(self, ref: "ray.ObjectRef[Any]", nbytes: int) -> None:
        """Keep an answer of so many bytes; on the event loop."""
        self._kept.append((ref, nbytes))
        self._nbytes += nbytes
        while self._nbytes > _MOST_BYTES and len(self._kept) > 1:
            self._drop_oldest()
        number = self._dropped + len(self._kept)
        asyncio.get_running_loop().call_later(_KEEP_S, self._drop_up_to, number)

    def _drop_up_to(self, number: int) -> None:
        while self._dropped < number:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, nbytes = self._kept.popleft()
        self._nbytes -= nbytes
        self._dropped += 1
