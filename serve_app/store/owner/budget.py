"""A byte budget that puts wait for, in the order they came."""

import asyncio
from collections import deque

from serve_app.errors import StoreFull


class Budget:
    """Bytes that may be held at once; lives on one event loop.

    ``take`` reserves before any byte moves, so use never passes ``total``.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """How many puts wait for room."""
        return sum(not future.done() for _, future in self._waiters)

    async def take(self, nbytes: int, timeout_s: float) -> None:
        """Reserve ``nbytes``; raise `StoreFull` when no room came within ``timeout_s``."""
        if nbytes > self.total:
            raise StoreFull(f"{nbytes} bytes can never fit a byte budget of {self.total}")
        if not self._waiters and self.used + nbytes <= self.total:
            self.used += nbytes
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((nbytes, granted))
        try:
            await asyncio.wait_for(asyncio.shield(granted), timeout_s)
        except (TimeoutError, asyncio.CancelledError) as error:
            # The grant may have come in the same turn of the loop as the time-out.
            if granted.done():
                self.used -= nbytes
            granted.cancel()
            self._grant()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise StoreFull(
                f"no room for {nbytes} bytes within {timeout_s} s:"
                f" {self.used} of {self.total} bytes are held"
            ) from None

    def give(self, nbytes: int) -> None:
        """Return reserved bytes and let waiting puts go on."""
        self.used -= nbytes
        assert self.used >= 0
        self._grant()

    def _grant(self) -> None:
        while self._waiters:
            nbytes, granted = self._waiters[0]
            if not granted.done():
                if self.used + nbytes > self.total:
                    return
                self.used += nbytes
                granted.set_result(None)
            self._waiters.popleft()
