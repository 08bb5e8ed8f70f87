"""Clients that go away while they are being served, and answers that are delivered or not."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
Pieces = AsyncGenerator[bytes, None]


class ClientGone(Exception):
    """The client closed its connection: whatever is answered now, nobody reads it."""


class Client:
    """Watches one client, from when its request was read until it is answered.

    Serve's proxy cancels the whole request when the client goes; a plain ASGI server only says
    so to whoever asks. Both end the work here the same way: by cancelling it.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone: asyncio.Task[None] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the client has closed its connection (also true once it was answered)."""
        return self._gone is not None and self._gone.done()

    async def __aenter__(self) -> Self:
        self._gone = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._gone is not None
        self._gone.cancel()
        await asyncio.wait([self._gone])

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` returns; cancel it and raise `ClientGone` when the client goes."""
        assert self._gone is not None
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._gone], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        raise ClientGone

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Answer(Response):
    """An answer made while it is sent: as events, or whole.

    Errors before the first piece become error answers. Whatever keeps the answer from being
    handed over to its end, a failure or a client that went away, ``abandoned`` is called once.
    """

    def __init__(self, pieces: Pieces, *, events: bool, abandoned: Callable[[], None]) -> None:
        kind = "text/event-stream" if events else "application/json"
        super().__init__(status_code=200, media_type=kind)
        if events:
            del self.headers["content-length"]
            self.headers["cache-control"] = "no-cache"
        self._pieces = pieces
        self._events = events
        self._abandoned = abandoned
        self._delivered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make and send the answer."""
        try:
            async with Client(receive) as client:
                await client.during(self._send(client, send))
        except ClientGone:
            pass
        finally:
            if not self._delivered:
                self._abandoned()

    async def _send(self, client: Client, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            piece = await anext(pieces)
            if self._events:
                await self._start(send)
                await _send_piece(send, piece)
                async for piece in pieces:
                    await _send_piece(send, piece)
        # From here on the client has all of it, or its connection broke on the way.
        if client.is_gone:
            raise ClientGone
        self._delivered = True
        if not self._events:
            self.headers["content-length"] = str(len(piece))
            await self._start(send)
        await _send_piece(send, b"" if self._events else piece, last=True)

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


async def _send_piece(send: Send, piece: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": not last})
