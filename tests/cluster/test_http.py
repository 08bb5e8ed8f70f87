"""HTTP through Serve's own proxies, two replicas of everything: control, abandonment, drain."""

import asyncio
import base64
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from openai import OpenAI
from ray import serve
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

from graphs.rollout import build
from serve_app import RoutedExpertsClient
from serve_app.client.over_http import RoutesFetcher
from serve_app.client.served import ServedGraph
from serve_app.config import RolloutArgs
from serve_app.weights.holder import newest_weights
from serve_app.wire.formats.ours import from_bytes
from tests.cluster.conftest import HTTP_PORT, ROLLOUT_YAML
from tests.eventually import eventually
from tests.ports import free_ports
from tests.trainers_group import broadcast, open_as_rank_0
from tests.xtuner_client import Rollout, XtunerWorker, sample_params

PREFIX = "/llm"
URL = f"http://127.0.0.1:{HTTP_PORT}{PREFIX}"
KEYS = {"authorization": "Bearer sampler"}
ADMIN = {"authorization": "Bearer boss"}
LONG = {"ignore_eos": True, "max_tokens": 480, "return_routed_experts": True}


def application(model: Path, **ingress: Any) -> RolloutArgs:
    args: dict[str, Any] = yaml.safe_load(ROLLOUT_YAML.read_text())["applications"][0]["args"]
    args["engine"] |= {"model": str(model), "dtype": "float32"}
    # What is under way when they are replaced ends by itself, however slow the machine is.
    patient = {"min_replicas": 2, "max_replicas": 2, "graceful_shutdown_timeout_s": 120}
    args["engine"]["serve"] = {**patient, "num_cpus": 0.2}
    args["decoder"]["serve"] |= {"num_cpus": 0.05}
    args["ingress"] = {
        "model_name": "policy",
        "api_keys": ["sampler"],
        "admin_keys": ["boss"],
        "open_networks": ["127.0.0.0/8"],
        "allow_pickle": True,
        "access_log": False,
        "control_timeout_s": 60,
        "serve": {**patient, "num_cpus": 0.05},
        **ingress,
    }
    return RolloutArgs.model_validate(args)


@pytest.fixture(scope="module")
def two(cluster: Cluster, tiny_checkpoint: Path) -> Iterator[RoutedExpertsClient]:
    serve.run(build(application(tiny_checkpoint)), name="two", route_prefix=PREFIX)
    yield RoutedExpertsClient("two")
    serve.delete("two")


@pytest.fixture(scope="module")
def http(two: RoutedExpertsClient) -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, headers=KEYS) as client:
        yield client


def everywhere(method: str) -> list[Any]:
    """Ask every engine replica; there are two."""
    answers = ServedGraph("two", None, 60).broadcast(method)
    assert len(answers) == 2
    return answers


def test_the_whole_way_with_real_clients(two: RoutedExpertsClient, tmp_path: Path) -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key="sampler", max_retries=0) as client:
        options: Any = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
        options |= {"max_tokens": 12, "temperature": 0}
        extra = {"return_routed_experts": True}
        whole = client.chat.completions.create(**options, extra_body=extra).choices[0]
        chunks = client.chat.completions.create(**options, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.message.content
    key = str(getattr(whole, "routed_experts"))  # noqa: B009  # openai does not declare it
    RoutesFetcher(URL, "sampler").fetch(key, tmp_path / "routes")
    fetched = from_bytes((tmp_path / "routes").read_bytes())
    assert fetched.meta == two.get(key).meta
    assert two.release([key]) == 1


async def test_xtuner_with_keys(two: RoutedExpertsClient) -> None:
    async def resolve(key: str) -> Any:
        record = await asyncio.to_thread(two.get, key)
        await asyncio.to_thread(two.release, [key])
        return record.ids

    worker = XtunerWorker(URL, resolve, "sampler")
    assert await asyncio.to_thread(worker.is_healthy)
    params = sample_params(max_tokens=16)
    async with httpx.AsyncClient(timeout=60) as http:
        rollouts = [Rollout([5, 6, turn]) for turn in range(16)]
        done = await asyncio.gather(*(worker.generate(http, one, params) for one in rollouts))
    assert {(one.status, one.error) for one in done} == {("completed", None)}
    assert all(one.routes is not None and one.routes.shape[1:] == (4, 4) for one in done)
    await asyncio.to_thread(worker.pause)
    await asyncio.to_thread(worker.shutdown)
    assert two.stats().live_keys == 0


def test_sleep_and_wake_reach_every_replica(http: httpx.Client) -> None:
    assert http.post(f"{URL}/sleep?level=2").status_code == 403
    assert http.post(f"{URL}/sleep?level=2", headers=ADMIN).status_code == 200
    assert everywhere("is_sleeping") == [True, True]
    assert http.get(f"{URL}/is_sleeping").json() == {"is_sleeping": True}
    for _ in range(6):
        answer = http.post(f"{URL}/generate", json={"input_ids": [5]})
        assert (answer.status_code, answer.json()["code"]) == (503, 503)
    assert http.post(f"{URL}/wakeup?tags=weights&tags=kv_cache", headers=ADMIN).status_code == 200
    assert everywhere("is_sleeping") == [False, False]
    assert http.post(f"{URL}/generate", json={"input_ids": [5]}).status_code == 200


def test_pickled_weights_reach_every_replica(http: httpx.Client, tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    named = [(name, -value) for name, value in model.state_dict().items()]
    half = len(named) // 2
    before = max(version for _, version in everywhere("weight_version"))
    for part, finished in ((named[:half], False), (named[half:], True)):
        data = base64.b64encode(pickle.dumps(part)).decode()
        body = {"serialized_named_tensors": data, "finished": finished}
        answer = http.post(f"{URL}/update_weights", json=body, headers=ADMIN)
        assert answer.status_code == 200, answer.text
    assert {version for _, version in everywhere("weight_version")} == {before + 1}
    kept = asyncio.run(newest_weights("two"))  # what a replica that starts later loads
    assert kept is not None
    assert kept.version == before + 1
    junk = base64.b64encode(b"junk").decode()
    bad: list[tuple[Any, str]] = [(junk, "expected pickled"), ([junk] * 2, "one part, got 2")]
    for sent, wrong in bad:
        answer = http.post(
            f"{URL}/update_weights", json={"serialized_named_tensors": sent}, headers=ADMIN
        )
        assert (answer.status_code, wrong in answer.text) == (400, True), answer.text


def test_a_trainers_process_group_reaches_every_replica(
    http: httpx.Client, tiny_checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    named = list(model.state_dict().items())
    (port,) = free_ports(1)
    group: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": port}
    group |= {"rank_offset": 1, "world_size": 3, "group_name": "policy", "backend": "gloo"}
    before = max(version for _, version in everywhere("weight_version"))
    too_small = http.post(
        f"{URL}/init_weights_update_group", json={**group, "world_size": 2}, headers=ADMIN
    )
    assert (too_small.status_code, "at least 3" in too_small.text) == (400, True)

    def call(path: str, body: dict[str, Any]) -> threading.Thread:
        def run() -> None:
            answer = httpx.post(f"{URL}/{path}", json=body, headers=ADMIN, timeout=60)
            answers.append((answer.status_code, answer.text))

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    answers: list[tuple[int, str]] = []
    joining = call("init_weights_update_group", group)
    trainer = open_as_rank_0(port, "policy", 3)
    joining.join(60)
    body = {
        "group_name": "policy",
        "names": [name for name, _ in named],
        "dtypes": ["float32"] * len(named),
        "shapes": [list(value.shape) for _, value in named],
        "finished": True,
    }
    receiving = call("update_weights_from_distributed", body)
    broadcast(trainer, named)
    receiving.join(60)
    call("destroy_weights_update_group", {"group_name": "policy"}).join(60)
    assert [status for status, _ in answers] == [200, 200, 200], answers
    assert {version for _, version in everywhere("weight_version")} == {before + 1}


def test_clients_that_leave_take_their_requests_along(two: RoutedExpertsClient) -> None:
    """Through the proxy: streams cut off half-way, and calls that nobody waits for any more."""

    async def stream(http: httpx.AsyncClient) -> None:
        body = {"input_ids": [5, 6], **LONG, "stream": True}
        async with http.stream("POST", f"{URL}/generate", json=body) as answer:
            async for line in answer.aiter_lines():
                assert line.startswith("data: ")
                return

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60, headers=KEYS) as http:
            await asyncio.gather(*(stream(http) for _ in range(8)))
            body = {"model": "policy", "messages": [], "input_ids": [5], "n": 2, **LONG}
            calls = [http.post(f"{URL}/v1/chat/completions", json=body) for _ in range(8)]
            waiting = [asyncio.create_task(call) for call in calls]
            await asyncio.to_thread(eventually, lambda: sum(everywhere("ongoing")) >= 8)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(leave())
    assert eventually(lambda: sum(everywhere("ongoing")) == 0)
    assert eventually(lambda: two.stats().live_keys == 0)


def test_abort_ends_what_runs_on_every_replica(two: RoutedExpertsClient) -> None:
    async def run() -> list[str]:
        async with httpx.AsyncClient(timeout=60, headers=KEYS) as http:

            async def stream(began: asyncio.Event) -> str:
                body = {"input_ids": [5, 6], **LONG, "stream": True}
                async with http.stream("POST", f"{URL}/generate", json=body) as answer:
                    events = [line async for line in _noting(answer, began) if line]
                assert events[-1] == "data: [DONE]"
                meta = json.loads(events[-2].removeprefix("data: "))["meta_info"]
                await asyncio.to_thread(two.release, [meta["routed_experts"]])
                return str(meta["finish_reason"]["type"])

            began = [asyncio.Event() for _ in range(8)]
            streams = [asyncio.create_task(stream(one)) for one in began]
            for one in began:
                await one.wait()
            answer = await http.post(f"{URL}/abort_request", json={"abort_all": True})
            assert answer.status_code == 200
            return list(await asyncio.gather(*streams))

    reasons = asyncio.run(run())
    assert "abort" in reasons
    assert set(reasons) <= {"abort", "length"}  # a stream may have ended before


async def _noting(answer: httpx.Response, began: asyncio.Event) -> Any:
    async for line in answer.aiter_lines():
        began.set()
        yield line


def test_a_redeployed_ingress_finishes_what_it_began(
    two: RoutedExpertsClient, tiny_checkpoint: Path
) -> None:
    body = {"input_ids": [5, 6], "ignore_eos": True, "max_tokens": 300, "stream": True}
    with (
        httpx.Client(timeout=60, headers=KEYS) as http,
        http.stream("POST", f"{URL}/generate", json=body) as answer,
    ):
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        changed = application(tiny_checkpoint, request_timeout_s=500)
        serve.run(build(changed), name="two", route_prefix=PREFIX)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    bodies = [json.loads(line.removeprefix("data: ")) for line in events[:-1]]
    assert [body["error"] for body in bodies if "error" in body] == []
    assert len(first["output_ids"]) + sum(len(body["output_ids"]) for body in bodies) == 300


def test_the_proxy_refuses_early_and_gives_up_on_stalled_readers(
    two: RoutedExpertsClient,
) -> None:
    head = f"POST {PREFIX}/generate HTTP/1.1\r\nhost: x\r\ncontent-length: {1 << 30}\r\n"
    for extra in ("", "".join(f"x-{number}: 1\r\n" for number in range(200))):
        with socket.create_connection(("127.0.0.1", HTTP_PORT), timeout=30) as at:
            at.sendall(f"{head}{extra}\r\n".encode())
            answer = b""
            while piece := at.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 400")
