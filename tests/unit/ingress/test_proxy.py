"""What stands before Serve's own proxy."""

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from serve_app.config import ProxyArgs, proxy_args
from serve_app.ingress.proxy import Patience, Turnstile

SCOPE: Scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}


async def _swallow(scope: Scope, receive: Receive, send: Send) -> None:
    """Read a body to its end, then say how long it was."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def test_the_proxy_takes_no_more_than_it_was_told() -> None:
    async def unsaid() -> Any:
        for _ in range(3):
            yield b"x" * 40

    app = Turnstile(_swallow, ProxyArgs(max_body_bytes=100, max_headers=8))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        assert (await http.post("/", content=b"x" * 100)).text == "100"
        said = await http.post("/", content=b"x" * 101)
        assert (said.status_code, said.headers["connection"]) == (400, "close")
        many = {f"x-{number}": "1" for number in range(9)}
        assert (await http.get("/", headers=many)).status_code == 400
        with pytest.raises(AssertionError):  # nothing was answered
            await http.post("/", content=unsaid())


async def test_a_client_that_stops_reading_is_as_good_as_gone() -> None:
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for number in range(5):
            await send({"type": "http.response.body", "body": b"x", "number": number})
        sent.append((await receive())["type"])

    async def never_read(message: Message) -> None:
        if message["number"] > 1:
            await asyncio.Event().wait()

    async def silent() -> Message:
        await asyncio.Event().wait()
        return {}

    await Patience(app, stall_s=0.01)(SCOPE, silent, never_read)
    assert sent == ["http.disconnect"]


async def test_a_client_that_reads_is_served_to_the_end() -> None:
    took: list[Message] = []

    async def read(message: Message) -> None:
        took.append(message)

    async def whole() -> Message:
        return {"type": "http.request", "body": b"abc", "more_body": False}

    await Patience(_swallow, stall_s=30)(SCOPE, whole, read)
    assert took[-1]["body"] == b"3"


def test_the_proxys_limits_come_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R3SERVE_PROXY_STALL_S", "2.5")
    assert proxy_args() == ProxyArgs(stall_s=2.5)
    monkeypatch.setenv("R3SERVE_PROXY_MAX_HEADERS", "none")
    with pytest.raises(ValidationError, match="max_headers"):
        proxy_args()
