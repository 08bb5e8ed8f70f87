"""Who may do what over HTTP, how much of it, and what is written down."""

import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.graph.conftest import MODEL
from tests.http_server import LocalGraph, client_of, listening

BODY = {"input_ids": [5, 6, 7], "max_tokens": 2}
WEIGHTS = {"serialized_named_tensors": "", "finished": True}


@contextmanager
def guarded(graph: LocalGraph, **ingress: Any) -> Iterator[httpx.Client]:
    with client_of(graph.edge(model_name=MODEL, **{"access_log": False, **ingress})) as http:
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_open_what_they_are_for(graph: LocalGraph, tmp_path: Path) -> None:
    (tmp_path / "admins").write_text("boss\n\nother boss\n")
    keys = {"api_keys": ["one", "two"], "admin_keys_file": tmp_path / "admins"}
    with guarded(graph, **keys) as http:
        assert http.get("/health").status_code == 200
        for headers, sampling, control in (
            ({}, 401, 401),
            (bearer("wrong"), 401, 401),
            ({"authorization": "Basic one"}, 401, 401),
            ({"authorization": "bearer two"}, 200, 403),
            (bearer("one"), 200, 403),
            (bearer("other boss"), 200, 200),
        ):
            assert http.post("/generate", json=BODY, headers=headers).status_code == sampling
            assert http.get("/v1/models", headers=headers).status_code == sampling
            assert http.get("/openapi.json", headers=headers).status_code == sampling
            for path in ("/wakeup", "/abort_request"):
                body = {"abort_all": True}
                assert http.post(path, json=body, headers=headers).status_code == control
            assert http.get("/terminate", headers=headers).status_code == control
        refused = http.post("/generate", json=BODY)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["type"] == "authentication_error"


def test_without_an_admin_key_nobody_sleeps_or_aborts(graph: LocalGraph) -> None:
    with guarded(graph, api_keys=["one"]) as http:
        answer = http.post("/sleep", headers=bearer("one"))
        assert (answer.status_code, answer.json()["type"]) == (403, "permission_error")


def test_pickled_weights_need_more_than_a_key(graph: LocalGraph) -> None:
    with guarded(graph, admin_keys=["boss"]) as http:
        answer = http.post("/update_weights", json=WEIGHTS, headers=bearer("boss"))
        assert answer.status_code == 403
        assert "allow_pickle is off" in answer.json()["message"]


def test_a_process_group_needs_a_fixed_number_of_replicas(graph: LocalGraph) -> None:
    group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1}
    group |= {"world_size": 3, "group_name": "policy", "backend": "gloo"}
    scale = {"min_replicas": 1, "max_replicas": 4}
    with guarded(graph, scale=scale, admin_keys=["boss"]) as http:
        answer = http.post("/init_weights_update_group", json=group, headers=bearer("boss"))
        assert answer.status_code == 400
        assert "min_replicas equal to max_replicas, got 1 and 4" in answer.json()["message"]


@pytest.mark.parametrize(("network", "status"), [("127.0.0.0/8", 200), ("10.0.0.0/8", 401)])
def test_what_xtuner_calls_without_key_is_open_to_its_network_only(
    graph: LocalGraph, network: str, status: int
) -> None:
    keys = {"api_keys": ["one"], "admin_keys": ["boss"], "open_networks": [network]}
    with guarded(graph, **keys) as http:
        assert http.post("/abort_request", json={"abort_all": True}).status_code == status
        assert http.get("/terminate").status_code == status
        assert http.post("/sleep").status_code == 401


def test_a_terminated_server_serves_on(graph: LocalGraph, http: httpx.Client) -> None:
    assert http.get("/terminate").status_code == 200
    assert http.post("/generate", json=BODY).status_code == 200


def test_bodies_are_bounded_by_what_they_say_and_by_what_they_are(graph: LocalGraph) -> None:
    def chunks() -> Iterator[bytes]:
        while True:
            yield b"[" * 1000

    with guarded(graph, max_body_bytes=4096) as http:
        said = http.post("/generate", content=b"x" * 5000)
        assert (said.status_code, said.headers["connection"]) == (400, "close")
        assert "at most 4096 bytes, got 5000" in said.json()["message"]
        try:
            streamed = http.post("/generate", content=chunks())
        except httpx.WriteError:
            return  # the server closed before all was sent, which never ends
        assert streamed.status_code == 400


def raw(url: str, head: str, body: bytes = b"") -> bytes:
    """Send bytes as they are and return the answer up to its end."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as at:
        at.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        answer = b""
        while piece := at.recv(65536):
            answer += piece
    return answer


def test_a_body_that_does_not_come_is_not_waited_for(graph: LocalGraph) -> None:
    edge = graph.edge(access_log=False, body_timeout_s=0.2)
    with listening(edge) as url:
        answer = raw(url, "POST /generate HTTP/1.1\nhost: x\ncontent-length: 10", b"{")
    assert answer.startswith(b"HTTP/1.1 408")


def test_headers_are_counted(graph: LocalGraph) -> None:
    with listening(graph.edge(access_log=False, max_headers=20)) as url:
        head = "GET /health HTTP/1.1\nhost: x\n" + "\n".join(f"x-{i}: 1" for i in range(50))
        answer = raw(url, head)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"at most 20 headers, got 51" in answer


def test_a_key_has_its_rate_and_its_share(graph: LocalGraph) -> None:
    keys = {"api_keys": ["one", "two"], "requests_per_s_per_key": 0.001}
    with guarded(graph, **keys) as http:
        assert http.post("/generate", json=BODY, headers=bearer("one")).status_code == 200
        again = http.post("/generate", json=BODY, headers=bearer("one"))
        assert (again.status_code, again.headers["retry-after"]) == (429, "1")
        assert again.json()["type"] == "rate_limit_error"
        assert http.post("/generate", json=BODY, headers=bearer("two")).status_code == 200


def test_more_than_a_replica_samples_at_once_is_told_when_to_come_back(graph: LocalGraph) -> None:
    long = {"input_ids": [5], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with guarded(graph, max_sampling=1) as http:
        with http.stream("POST", "/generate", json=long) as running:
            assert running.status_code == 200
            busy = http.post("/generate", json=BODY)
            assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
            assert http.get("/health").status_code == 200
        assert _until_200(http) == 200


def _until_200(http: httpx.Client) -> int:
    """Ask until the abandoned stream has made room."""
    for _ in range(200):
        answer = http.post("/generate", json=BODY)
        if answer.status_code == 200:
            return 200
        threading.Event().wait(0.02)
    return answer.status_code


def test_requests_have_ids_and_origins_stay_closed(http: httpx.Client) -> None:
    answer = http.post("/generate", json=BODY, headers={"origin": "https://elsewhere.example"})
    assert len(answer.headers["x-request-id"]) == 32
    assert "access-control-allow-origin" not in answer.headers


def test_the_log_says_who_and_what_but_no_secret(
    graph: LocalGraph, caplog: pytest.LogCaptureFixture
) -> None:
    secret, prompt = "my-secret-key", "my secret prompt"
    with (
        caplog.at_level(logging.INFO, "r3serve.access"),
        guarded(graph, api_keys=[secret], access_log=True) as http,
    ):
        headers = bearer(secret) | {"x-request-id": "turn-7"}
        http.post("/generate", json={"prompt": prompt, "max_tokens": 1}, headers=headers)
        http.post("/generate?token=hidden", json=BODY, headers=bearer("wrong-key"))
        http.get("/my-secret-path", headers=headers)
    texts = [record.getMessage() for record in caplog.records if record.name == "r3serve.access"]
    lines: dict[tuple[str, int], Mapping[str, Any]] = {
        (line["path"], line["status"]): line for line in map(json.loads, texts)
    }
    assert set(lines) == {("/generate", 200), ("/generate", 401), ("-", 404)}
    sampled = lines["/generate", 200]
    assert (sampled["caller"], sampled["request_id"]) == ("api-0", "turn-7")
    assert sampled["ms"] > 0
    assert sampled["bytes_out"] > 0
    assert lines["/generate", 401]["caller"] == "anonymous"
    for word in ("secret", "wrong", "hidden"):
        assert word not in "".join(texts).replace("my-secret-path", "")
    assert "my-secret-path" not in "".join(texts)


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_garbage_is_a_400(http: httpx.Client, junk: bytes) -> None:
    for kind in ("application/json", "text/plain"):
        for path in ("/generate", "/v1/chat/completions", "/routed_experts/fetch"):
            answer = http.post(path, content=junk, headers={"content-type": kind})
            assert (answer.status_code, answer.json()["code"]) == (400, 400)


def test_one_level_of_sleep_after_another(http: httpx.Client) -> None:
    try:
        for level in (1, 2):
            assert http.post(f"/sleep?level={level}").status_code == 200
            assert http.get("/is_sleeping").json() == {"is_sleeping": True}
            assert http.get("/health").json()["status"] == "sleeping"
            refused = http.post("/generate", json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert http.post("/wakeup?tags=weights").status_code == 200
            assert http.post("/generate", json=BODY).status_code == 503
            assert http.post("/wakeup?tags=kv_cache").status_code == 200
            assert http.post("/generate", json=BODY).status_code == 200
        assert http.post("/wakeup?tags=brain").status_code == 400
        assert http.post("/sleep?level=3").status_code == 400
    finally:
        http.post("/wakeup")
    assert http.get("/health").json()["status"] == "healthy"
