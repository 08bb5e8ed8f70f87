"""Both clients against the served graph, from everywhere a trainer may call."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import aclosing, suppress
from typing import Any, cast

import numpy as np
import pytest
import ray
import requests
import torch
from ray import serve
from ray.serve.schema import ServeInstanceDetails
from transformers import AutoModelForCausalLM

from serve_app import (
    AsyncRoutedExpertsClient,
    GenerateRequest,
    RoutedExpertsClient,
    RoutedSequence,
)
from serve_app.client.served import DECODER, ENGINE
from serve_app.errors import (
    EngineUnavailable,
    InvalidRequest,
    KeyReleased,
    StoreUnavailable,
    UnknownKey,
    WeightsMismatch,
)
from tests.cluster.conftest import APP, HTTP_PORT
from tests.eventually import eventually
from tests.store_contract import LARGE, MakeStore, record


def request(**fields: Any) -> GenerateRequest:
    defaults = {"input_ids": [5, 6, 7, 8], "max_new_tokens": 6, "ignore_eos": True}
    return GenerateRequest.model_validate(
        {**defaults, "return_routed_experts": True, "seed": 1, **fields}
    )


def whole_job(client: RoutedExpertsClient) -> list[int]:
    """Sample, read, materialize both ways, meet an error, release; return the tensor's shape."""
    result = client.generate(request())
    key = result.routed_experts
    assert isinstance(key, str)
    ids = client.get(key).ids
    batches = [
        client.materialize([RoutedSequence(key, 10)], where=where, dtype="int32")
        for where in ("local", "decoder", "auto")
    ]
    for batch in batches:
        np.testing.assert_array_equal(batch.ids[:9].numpy(), ids)
        assert batch.valid.tolist() == [True] * 9 + [False]
    with pytest.raises(InvalidRequest, match="9999"):
        client.generate(request(input_ids=[9999]))
    assert client.release([key]) == 1
    with pytest.raises(KeyReleased):
        client.materialize([RoutedSequence(key, 10)], where="decoder")
    return list(batches[0].ids.shape)


async def whole_job_async(client: AsyncRoutedExpertsClient) -> list[int]:
    results = await client.generate_batch([request(), request(input_ids=[9999]), request()])
    keys = [str(result.routed_experts) for result in results if result.error is None]
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    sequences = [RoutedSequence(key, 9) for key in keys]
    local = await client.materialize(sequences, where="local")
    elsewhere = await client.materialize(sequences, where="decoder")
    assert torch.equal(local.ids, elsewhere.ids)
    chunks = [chunk async for chunk in client.stream(request(return_routed_experts=False))]
    assert [token for chunk in chunks for token in chunk.output_ids] == results[0].output_ids
    with pytest.raises(InvalidRequest, match="9999"):
        await client.generate(request(input_ids=[9999]))
    assert await client.release(keys) == 2
    with pytest.raises(KeyReleased):
        await client.get(keys[0])
    return list(local.ids.shape)


def test_a_stream_that_is_left_leaves_no_key(client: RoutedExpertsClient) -> None:
    before = client.stats().live_keys
    chunks = client.stream(request(max_new_tokens=64))
    assert next(iter(chunks)).result is None
    # The engine runs ahead of its reader.
    assert eventually(lambda: client.stats().live_keys > before)
    cast(Generator[Any, None, None], chunks).close()
    assert eventually(lambda: client.stats().live_keys == before)


async def test_nor_does_one_that_is_awaited(client: RoutedExpertsClient) -> None:
    before = (await asyncio.to_thread(client.stats)).live_keys
    left = AsyncRoutedExpertsClient(APP).stream(request(max_new_tokens=64))
    async with aclosing(left) as chunks:
        assert (await anext(chunks)).result is None
        assert await asyncio.to_thread(eventually, lambda: client.stats().live_keys > before)
    assert await asyncio.to_thread(eventually, lambda: client.stats().live_keys == before)


def test_what_came_too_late_leaves_no_key_either(client: RoutedExpertsClient) -> None:
    """Given up at any moment: while it samples, while its record is put, when its key is there."""
    before = client.stats().live_keys
    for number in range(1, 21):
        late = request(request_id=f"late-{number}", max_new_tokens=2)
        with suppress(EngineUnavailable):
            result = client.generate(late, timeout_s=0.004 * number)
            client.release([str(result.routed_experts)])
    assert eventually(lambda: client.stats().live_keys == before)


class Trainer:
    def work(self) -> list[int]:
        return whole_job(RoutedExpertsClient(APP))


class AsyncTrainer:
    async def work(self) -> list[int]:
        return await whole_job_async(AsyncRoutedExpertsClient(APP))


def test_from_the_driver(client: RoutedExpertsClient) -> None:
    assert whole_job(client) == [10, 4, 4]


async def test_from_the_drivers_event_loop(app: str) -> None:
    assert await whole_job_async(AsyncRoutedExpertsClient(app)) == [18, 4, 4]


def test_from_a_task(app: str) -> None:
    assert ray.get(ray.remote(lambda: whole_job(RoutedExpertsClient(app))).remote()) == [10, 4, 4]


@pytest.mark.parametrize("node", ["trainer", "elsewhere"])
@pytest.mark.parametrize("kind", [Trainer, AsyncTrainer])
def test_from_an_actor_on_any_node(app: str, kind: type, node: str) -> None:
    actor: Any = ray.remote(kind).options(resources={node: 1}).remote()
    assert ray.get(actor.work.remote(), timeout=180)[1:] == [4, 4]
    ray.kill(actor)


def kill_replica(deployment: str) -> None:
    """SIGKILL one replica of a deployment and wait until Serve has another."""
    old = replicas(deployment)[0]
    os.kill(old.pid, signal.SIGKILL)
    deadline, tick = time.monotonic() + 90, threading.Event()
    while not (now := replicas(deployment)) or old.replica_id in [one.replica_id for one in now]:
        assert time.monotonic() < deadline, f"Serve started no other {deployment}"
        tick.wait(0.1)


def replicas(deployment: str) -> list[Any]:
    served = cast("Any", serve.context._get_global_client()).get_serve_details()
    details = ServeInstanceDetails.model_validate(served).applications[APP]
    return [r for r in details.deployments[deployment].replicas if r.state == "RUNNING"]


def test_a_key_reads_after_its_engine_replica_was_killed(client: RoutedExpertsClient) -> None:
    result = client.generate(request())
    key = str(result.routed_experts)
    before = client.get(key).ids.copy()
    kill_replica(ENGINE)
    np.testing.assert_array_equal(client.get(key).ids, before)
    again = client.generate(request())
    assert again.output_ids == result.output_ids
    client.release([key, str(again.routed_experts)])


def test_materialize_survives_the_decoder(client: RoutedExpertsClient) -> None:
    key = client.put(record(LARGE).ids, num_experts=128)
    for replica in replicas(DECODER):
        os.kill(replica.pid, signal.SIGKILL)
    batch = client.materialize([RoutedSequence(key, LARGE[0])], where="decoder")
    np.testing.assert_array_equal(batch.ids.numpy(), record(LARGE).ids)
    client.release([key])


def test_weights_reach_replicas_that_start_later(
    client: RoutedExpertsClient, tiny_checkpoint: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    old = model.state_dict()
    first = client.generate(request(temperature=0, return_routed_experts=False))
    new = {name: -value for name, value in old.items()}
    (taken,) = client.update_weights(new, version=3)
    assert (taken.version, taken.error) == (3, None)
    changed = client.generate(request(temperature=0, return_routed_experts=False))
    assert changed.weight_version == 3
    assert changed.output_ids != first.output_ids
    with pytest.raises(WeightsMismatch, match="missing"):
        client.update_weights({"lm_head.weight": old["lm_head.weight"]}, version=4)
    kill_replica(ENGINE)
    later = client.generate(request(temperature=0, return_routed_experts=False))
    assert (later.output_ids, later.weight_version) == (changed.output_ids, 3)
    client.update_weights(ray.put(old), version=5, mode="drain")
    back = client.generate(request(temperature=0, return_routed_experts=False))
    assert (back.output_ids, back.weight_version) == (first.output_ids, 5)


def test_an_application_that_nobody_serves_is_named(app: str) -> None:
    nobody = RoutedExpertsClient("nobody")
    with pytest.raises(EngineUnavailable, match="nobody"):
        nobody.generate(request())
    with pytest.raises(StoreUnavailable, match="nobody"):
        nobody.stats()


def test_a_key_of_another_application_is_refused(
    client: RoutedExpertsClient, make_store: MakeStore
) -> None:
    foreign = make_store(app="another").put(record())
    for where in ("local", "decoder"):
        with pytest.raises(UnknownKey, match="belongs to application 'another'"):
            client.materialize([RoutedSequence(foreign, 5)], where=where)


def test_no_engine_replica_times_out_and_does_not_hang(cluster: object) -> None:
    class Engine:
        async def generate(self, request: GenerateRequest) -> None: ...

    unplaceable = serve.deployment(
        name=ENGINE,
        ray_actor_options={"resources": {"nowhere": 1}},
        graceful_shutdown_timeout_s=0,  # or Serve waits for what never began
    )
    target = serve.RunTarget(unplaceable(Engine).bind(), name="unplaced", route_prefix="/unplaced")
    serve.run_many([target], wait_for_applications_running=False)
    waiting = RoutedExpertsClient("unplaced", timeout_s=2, generate_timeout_s=2)
    with pytest.raises(EngineUnavailable, match="no answer within 2"):
        waiting.generate(request())
    with pytest.raises(EngineUnavailable, match=r"no engine replica .* within 2"):
        waiting.abort(all=True)
    with pytest.raises(EngineUnavailable):
        next(iter(waiting.stream(request())))
    serve.delete("unplaced")


def test_http_gives_the_same(client: RoutedExpertsClient) -> None:
    at = f"http://127.0.0.1:{HTTP_PORT}"
    assert requests.get(f"{at}/health", timeout=30).json()["status"] == "healthy"
    body: dict[str, Any] = {
        "input_ids": [5, 6, 7, 8],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
    }
    body |= {"return_routed_experts": True, "return_logprob": True, "unknown_field": 1}
    answer = requests.post(f"{at}/generate", json=body, timeout=180).json()
    expected = client.generate(request(temperature=0, return_routed_experts=False))
    assert answer["output_ids"] == expected.output_ids
    assert answer["text"] == expected.text
    meta = answer["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 6)
    assert meta["finish_reason"] == {"type": "length"}
    assert [token for _, token in meta["output_token_logprobs"]] == expected.output_ids
    assert client.get(meta["routed_experts"]).ids.shape == (9, 4, 4)
    client.release([meta["routed_experts"]])
    refused = requests.post(f"{at}/generate", json={"input_ids": [9999]}, timeout=180)
    assert refused.status_code == 400
    assert "9999" in refused.json()["message"]
    assert refused.json()["object"] == "error"
    empty = requests.post(f"{at}/generate", json={"input_ids": []}, timeout=180)
    assert (empty.status_code, empty.json()["type"]) == (400, "invalid_request_error")


def test_nothing_is_left(client: RoutedExpertsClient) -> None:
    assert client.stats().live_keys == 0
    assert client.stats().live_bytes == 0
