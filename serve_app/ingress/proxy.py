"""What stands before Serve's HTTP proxy on every node, where it is told to load this.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.ingress.proxy.middlewares

The proxy reads a body as fast as it comes, whatever the ingress thinks of it, and keeps what a
client does not read: both without bound. Here a body that says it is too large is refused before
its first byte, and a client that reads nothing for a while is treated as gone, so that its
request is aborted and what was kept for it is dropped.
"""

import asyncio
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import ProxyArgs, proxy_args
from serve_app.ingress.guard.errors import failure

_GONE: Message = {"type": "http.disconnect"}


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy puts before itself; called in each proxy as it starts."""
    args = proxy_args()
    return [Middleware(Turnstile, args=args), Middleware(Patience, stall_s=args.stall_s)]


class Turnstile:
    """Refuses what is too large by what it says of itself, and cuts off what says nothing."""

    def __init__(self, app: ASGIApp, args: ProxyArgs) -> None:
        self._app = app
        self._args = args

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        why = self._why_not(scope)
        if why is not None:
            await failure(400, why, headers={"connection": "close"})(scope, receive, send)
            return
        left = self._args.max_body_bytes

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return _GONE if left < 0 else message

        await self._app(scope, bounded, send)

    def _why_not(self, scope: Scope) -> str | None:
        raw = scope["headers"]
        if len(raw) > self._args.max_headers:
            return f"expected at most {self._args.max_headers} headers, got {len(raw)}"
        length = Headers(scope=scope).get("content-length", "0")
        most = self._args.max_body_bytes
        if not (length.isascii() and length.isdigit() and int(length[:20]) <= most):
            return f"expected at most {most} bytes, got {length[:20]}"
        return None


class Patience:
    """Gives up on clients that read nothing for ``stall_s`` seconds."""

    def __init__(self, app: ASGIApp, stall_s: float) -> None:
        self._app = app
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request for as long as its client reads."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stalled = asyncio.Event()

        async def watched_send(message: Message) -> None:
            if stalled.is_set():
                return  # nobody reads it; the proxy finds out from `receive`
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                stalled.set()

        async def receive_or_stall() -> Message:
            waiting: list[asyncio.Task[Any]] = [
                asyncio.create_task(receive()),  # type: ignore[arg-type]
                asyncio.create_task(stalled.wait()),
            ]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                message: Message = waiting[0].result() if waiting[0].done() else _GONE
                return message
            finally:
                for task in waiting:
                    task.cancel()

        await self._app(scope, receive_or_stall, watched_send)
