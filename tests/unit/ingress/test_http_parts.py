"""What the HTTP edge is made of, piece by piece."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from serve_app.config import IngressArgs, ProxyArgs, proxy_args
from serve_app.ingress.dialects.events import Json
from serve_app.ingress.guard.auth import Caller, KeyRing, Refusal
from serve_app.ingress.guard.errors import NotAcceptable
from serve_app.ingress.guard.limits import Busy, Load
from serve_app.ingress.operations.formats import NPY, OF_RECORDS, OURS, SAFETENSORS, acceptable
from serve_app.ingress.proxy import Patience, Turnstile

SCOPE: Scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}


def test_the_name_of_a_caller_is_not_its_key() -> None:
    ring = KeyRing(IngressArgs.model_validate({"api_keys": ["a", "b"], "admin_keys": ["c"]}))
    assert ring.admit("/generate", "Bearer b", None) == Caller("api-1", admin=False)
    assert ring.admit("/sleep", "Bearer c", None) == Caller("admin-0", admin=True)
    refused = ring.admit("/generate", "Bearer é", None)
    assert isinstance(refused, Refusal)
    assert "é" not in refused.message


def test_admin_keys_alone_leave_sampling_free() -> None:
    ring = KeyRing(IngressArgs.model_validate({"admin_keys": ["c"]}))
    assert isinstance(ring.admit("/generate", None, None), Caller)
    assert ring.admit("/sleep", None, None) != Caller("anonymous", admin=True)
    free = KeyRing(IngressArgs()).admit("/sleep", None, None)
    assert free == Caller("anonymous", admin=True)


@pytest.mark.parametrize("client", [None, "", "not an address", "10.0.0.1", "::1"])
def test_an_address_outside_every_network_opens_nothing(client: str | None) -> None:
    given = {"admin_keys": ["c"], "open_networks": ["192.168.0.0/16", "fd00::/8"]}
    ring = KeyRing(IngressArgs.model_validate(given))
    assert isinstance(ring.admit("/terminate", None, client), Refusal)
    assert isinstance(ring.admit("/terminate", None, "192.168.3.4"), Caller)
    assert isinstance(ring.admit("/sleep", None, "192.168.3.4"), Refusal)


def test_empty_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        KeyRing(IngressArgs.model_validate({"api_keys": [""]}))


def test_keys_do_not_show_where_a_configuration_is_printed() -> None:
    assert "secret" not in repr(IngressArgs.model_validate({"api_keys": ["secret"]}))


def test_control_keeps_its_room() -> None:
    assert IngressArgs().sampling_limit == 384
    with pytest.raises(ValidationError, match="no room for aborts"):
        IngressArgs.model_validate({"max_sampling": 512})


def test_load_is_counted_where_it_is_sampled() -> None:
    load = Load(IngressArgs.model_validate({"max_sampling": 3, "max_per_key": 2}))
    for _ in range(2):
        assert load.enter("/generate", "api-0") is None
    assert load.enter("/v1/completions", "api-0") == Busy(
        429, "at most 2 requests of one key at once"
    )
    assert load.enter("/health", "api-0") is None
    assert load.enter("/generate", "api-1") is None
    busy = load.enter("/generate", "api-2")
    assert busy is not None
    assert busy.status == 503
    load.leave("/generate", "api-0")
    assert load.enter("/generate", "api-2") is None


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, OURS),
        ("*/*", OURS),
        ("application/octet-stream", OURS),
        (NPY, NPY),
        (f"text/html, {SAFETENSORS};q=0.5, {NPY};q=0.4", SAFETENSORS),
    ],
)
def test_the_form_is_what_the_client_would_rather_have(accept: str | None, kind: str) -> None:
    assert acceptable(accept, OF_RECORDS) == kind


@pytest.mark.parametrize("accept", [f"{NPY};q=0, {OURS};q=x", "text/html"])
def test_a_client_that_takes_no_form_hears_which_there_are(accept: str) -> None:
    with pytest.raises(NotAcceptable, match=f"one of {OURS}, .*, got '{accept[:9]}"):
        acceptable(accept, OF_RECORDS)


async def test_arrays_become_nested_lists_in_json() -> None:
    ids = np.arange(200 * 2 * 3, dtype=np.uint16).reshape(200, 2, 3)
    out = Json()
    body = {"a": out.routes(ids), "b": out.routes("key"), "c": out.routes(ids[:1])}
    assert json.loads(await out.make(body)) == {
        "a": ids.tolist(),
        "b": "key",
        "c": ids[:1].tolist(),
    }


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
