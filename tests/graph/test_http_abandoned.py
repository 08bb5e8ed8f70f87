"""Clients that go away: their requests end in the engine, and their records are released."""

import asyncio
import json
import socket
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from serve_app import GenerateRequest
from serve_app.deployments.sampling.unread import Unread
from serve_app.ingress.edge.abandonment import Client, ClientGone
from serve_app.ingress.edge.edge import Ingress
from tests.eventually import eventually
from tests.graph.conftest import MODEL
from tests.http_server import LocalGraph, listening

ROUTES = {"return_routed_experts": True, "ignore_eos": True, "max_tokens": 480}


def cut_off(url: str, path: str, body: bytes, *, after: bytes) -> None:
    """Send a request and close the connection once ``after`` was seen in the answer."""
    parts = urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as at:
        at.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        seen = b""
        while after not in seen:
            seen += at.recv(65536)
        at.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset


@pytest.fixture
def edge(graph: LocalGraph) -> Ingress:
    return graph.edge(model_name=MODEL, access_log=False)


def check_nothing_is_left(graph: LocalGraph, edge: Ingress) -> None:
    """The requests were aborted without help, long before their end, and left no key."""
    assert eventually(lambda: edge.keeper.load.sampling == 0)
    edge._control.shutdown(wait=True)
    assert graph.client.abort(all=True) == 0
    assert eventually(lambda: graph.client.stats().live_keys == 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [5, 6]}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [], "input_ids": [5], "n": 3}),
        ("/v1/completions", {"model": MODEL, "prompt": [[5], [6]]}),
    ],
)
def test_a_stream_that_is_cut_off_ends_everywhere(
    graph: LocalGraph, edge: Ingress, path: str, body: dict[str, object]
) -> None:
    sent = json.dumps({**body, **ROUTES, "stream": True}).encode()
    with listening(edge) as url:
        cut_off(url, path, sent, after=b"data: ")
        check_nothing_is_left(graph, edge)


@pytest.mark.parametrize("n", [1, 3])
async def test_whoever_waits_for_a_whole_answer_may_go_too(
    graph: LocalGraph, edge: Ingress, n: int
) -> None:
    with listening(edge) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            body = {"model": MODEL, "messages": [], "input_ids": [5, 6], "n": n, **ROUTES}
            calls = [http.post("/v1/chat/completions", json=body) for _ in range(4)]
            waiting = [asyncio.create_task(call) for call in calls]
            assert await asyncio.to_thread(eventually, lambda: edge.keeper.load.sampling == 4)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.to_thread(check_nothing_is_left, graph, edge)


def test_a_key_that_nobody_will_read_ends(graph: LocalGraph) -> None:
    """Whichever comes first, the key or the news that its client went."""
    result = graph.client.generate(_request("late"))
    assert graph.client.stats().live_keys == 1
    engine = graph.handles.engine
    engine.abandon.remote("late").result(timeout_s=30)
    assert graph.client.stats().live_keys == 0
    engine.abandon.remote("late").result(timeout_s=30)
    early = graph.client.generate(_request("late"))  # a new request of that id is its own
    assert early.routed_experts is not None
    graph.client.release([str(early.routed_experts)])
    assert result.routed_experts != early.routed_experts


def _request(request_id: str) -> GenerateRequest:
    return GenerateRequest(
        input_ids=[5], max_new_tokens=3, return_routed_experts=True, request_id=request_id
    )


def test_unread_keys_are_remembered_for_a_while() -> None:
    unread = Unread(kept=2)
    assert unread.handed_out("a", "key-a")
    assert unread.abandon("a") == "key-a"
    assert unread.abandon("a") is None
    unread.begins("b")
    assert unread.abandon("b") is None
    assert not unread.handed_out("b", "key-b")
    for name in "cdef":
        assert unread.handed_out(name, name)
    assert [unread.abandon(name) for name in "cdef"] == [None, None, "e", "f"]


async def test_work_is_cancelled_when_the_client_goes() -> None:
    gone, cancelled = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, object]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        gone.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with Client(receive) as client:
        with pytest.raises(ClientGone):
            await client.during(work())
        assert client.is_gone
    assert cancelled.is_set()


async def test_work_that_ends_first_has_its_result() -> None:
    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def work() -> int:
        return int(np.int64(3))

    async with Client(receive) as client:
        assert await client.during(work()) == 3
        assert not client.is_gone
