"""The gate before every route: who comes, with how much, and what is written down of it.

What it refuses costs no more than its headers: nothing of a body is read before its sender, its
size and the load allow it. A refused body's connection is closed, since the rest of it would
otherwise have to be read to find the next request.
"""

import asyncio
import re
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import IngressArgs
from serve_app.ingress.guard.access_log import AccessLog, Entry
from serve_app.ingress.guard.auth import KeyRing, Refusal
from serve_app.ingress.guard.errors import failure
from serve_app.ingress.guard.limits import Load
from serve_app.ingress.guard.metrics import IngressMetrics

if TYPE_CHECKING:
    from fastapi.responses import Response

_FULL = "too many bytes of other requests are in memory"
_CLOSE = {"connection": "close"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_WEIGHTS = frozenset({"/update_weights"})


class Doorkeeper:
    """What the gate of one replica knows; outlives every request."""

    def __init__(self, args: IngressArgs, paths: Iterable[str]) -> None:
        self.args = args
        self.keys = KeyRing(args)
        self.load = Load(args)
        self.log = AccessLog(args.access_log, paths)
        self.metrics = IngressMetrics(paths)
        self.buffered = 0

    def body_limit(self, path: str) -> int:
        """Return the most bytes that a request to ``path`` may carry."""
        return self.args.max_weights_bytes if path in _WEIGHTS else self.args.max_body_bytes


class Gate:
    """ASGI middleware; ``keeper`` finds the replica's doorkeeper once requests come."""

    def __init__(self, app: ASGIApp, keeper: Callable[[], Doorkeeper]) -> None:
        self._app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        keeper, headers = self._keeper(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        client = scope["client"][0] if scope.get("client") else None
        entry = Entry(request_id, scope["method"], path, client)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.started(message["status"])
                if not given:  # Serve's proxy adds the ones that it knows
                    MutableHeaders(scope=message).append("x-request-id", request_id)
            elif message["type"] == "http.response.body":
                entry.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._pass(keeper, entry, headers, scope, receive, answer)
        finally:
            keeper.log.write(entry)
            keeper.metrics.answered(entry)

    async def _pass(
        self,
        keeper: Doorkeeper,
        entry: Entry,
        headers: Headers,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        if refused := self._refused(keeper, entry, headers, scope):
            await refused(scope, receive, send)
            return
        if busy := keeper.load.enter(entry.path, entry.caller):
            await failure(busy.status, busy.message, headers=_CLOSE)(scope, receive, send)
            return
        try:
            body = await _read(keeper, entry, receive, keeper.body_limit(entry.path))
            if not isinstance(body, bytes):
                if body is not None:
                    await body(scope, receive, send)
                return
            await self._app(scope, _replaying(body, receive), send)
        finally:
            keeper.buffered -= entry.bytes_in
            keeper.load.leave(entry.path, entry.caller)

    def _refused(
        self, keeper: Doorkeeper, entry: Entry, headers: Headers, scope: Scope
    ) -> "Response | None":
        most = keeper.args.max_headers
        if len(headers.raw) > most:
            found = len(headers.raw)
            return failure(400, f"expected at most {most} headers, got {found}", headers=_CLOSE)
        admitted = keeper.keys.admit(entry.path, headers.get("authorization"), entry.client)
        if isinstance(admitted, Refusal):
            return failure(admitted.status, admitted.message, headers=_CLOSE)
        entry.caller = admitted.name
        scope.setdefault("state", {})["admin"] = admitted.admin
        limit, length = keeper.body_limit(entry.path), headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return failure(400, "expected a content-length in digits", headers=_CLOSE)
        if int(length[:20]) > limit:
            return failure(400, f"expected at most {limit} bytes, got {length}", headers=_CLOSE)
        if keeper.buffered + int(length) > keeper.args.max_buffered_bytes:
            return failure(503, _FULL, headers=_CLOSE)
        return None


async def _read(
    keeper: Doorkeeper, entry: Entry, receive: Receive, limit: int
) -> "bytes | Response | None":
    """Return the body, or why it is refused, or None if the client went away."""
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(keeper.args.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                entry.bytes_in += len(pieces[-1])
                keeper.buffered += len(pieces[-1])
                if entry.bytes_in > limit:
                    return failure(400, f"expected at most {limit} bytes", headers=_CLOSE)
                if keeper.buffered > keeper.args.max_buffered_bytes:
                    return failure(503, _FULL, headers=_CLOSE)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        waited = keeper.args.body_timeout_s
        return failure(408, f"expected the whole body within {waited:g} s", headers=_CLOSE)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then wait for what comes after it: that the client goes away."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
