"""LMDeploy replicas in a served graph: both ways of the routes, and a replica that is killed."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from serve_app import RoutedExpertsClient
from serve_app.client.served import ENGINE, ServedGraph
from serve_app.deployments.routing.affinity import home_of, session_of
from serve_app.errors import EngineUnavailable
from serve_app.records import Record, hash_tokens
from serve_app.types import GenerateRequest, GenerateResult
from tests.engine_contract import first_new_token, mixed_requests
from tests.lmdeploy.served.graphs import remove, served


def wanted() -> list[GenerateRequest]:
    return [
        one.model_copy(update={"request_id": f"w{i}"}) for i, one in enumerate(mixed_requests(8))
    ]


def record_of(client: RoutedExpertsClient, result: GenerateResult) -> Record:
    assert isinstance(result.routed_experts, str), result.routed_experts_error
    return client.get(result.routed_experts)


def test_a_session_has_one_home_and_few_move() -> None:
    names = [f"replica {n}" for n in range(5)]
    talks = [f"talk {n}" for n in range(200)]
    homes = {talk: home_of(talk, names) for talk in talks}
    assert set(homes.values()) == set(names)
    moved = [talk for talk in talks if home_of(talk, names[1:]) != homes[talk]]
    assert {homes[talk] for talk in moved} == {names[0]}
    request = GenerateRequest(input_ids=[1])
    assert session_of([request]) is None
    assert session_of([request.model_copy(update={"session": "a"}), 3]) == "a"
    assert session_of([request.model_copy(update={"request_id": "session-4"})]) == "session-4"


@pytest.mark.usefixtures("cluster")
def test_both_transfers_give_the_same_records(sparse: Path) -> None:
    found: list[list[tuple[GenerateResult, Record]]] = []
    kinds: dict[str, dict[str, Any]] = {"ours": {}, "theirs": {"transfer": "lmdeploy"}}
    for name, kwargs in kinds.items():
        client = served(name, sparse, **kwargs)
        plain = client.generate_batch(wanted())
        stop, _ = first_new_token(plain[-1].output_ids)
        stripped = wanted()[-1].model_copy(
            update={"stop_token_ids": (stop,), "include_stop_token": False}
        )
        results = [*plain, client.generate(stripped)]
        assert results[-1].finish_reason == "stop"
        found.append([(result, record_of(client, result)) for result in results])
        keys = [str(result.routed_experts) for result in results]
        assert client.release(keys) == len(keys)
        assert client.stats().live_keys == 0
        remove(name)
    prompts = [*(one.input_ids for one in wanted()), wanted()[-1].input_ids]
    for prompt, (ours, record), (theirs, other) in zip(prompts, *found, strict=True):
        assert ours.output_ids == theirs.output_ids
        assert record.meta == other.meta
        np.testing.assert_array_equal(record.ids, other.ids)
        rows = len(prompt) + len(ours.output_ids) - 1
        assert record.meta.token_hash == hash_tokens([*prompt, *ours.output_ids][:rows])


@pytest.mark.usefixtures("cluster")
def test_a_replica_killed_under_load_loses_no_key(sparse: Path) -> None:
    client = served("killed", sparse, replicas=2)
    before = client.generate_batch(wanted())
    records = [record_of(client, result) for result in before]
    long = [one.model_copy(update={"max_new_tokens": 600}) for one in wanted()]
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(client.generate, one) for one in long]
        replica = next(iter(client.stream(wanted()[0].model_copy(update={"request_id": "s"}))))
        assert replica.output_ids
        victims = [
            actor
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if f"SERVE_REPLICA::killed#{ENGINE}" in actor["name"]
        ]
        assert len(victims) == 2
        ray.kill(ray.get_actor(victims[0]["name"], namespace=victims[0]["namespace"]))
        ends = [future.exception(timeout=120) or future.result() for future in running]
    assert {type(end) for end in ends} <= {GenerateResult, EngineUnavailable}
    for result, record in zip(before, records, strict=True):
        np.testing.assert_array_equal(record_of(client, result).ids, record.ids)
    for end in ends:
        if isinstance(end, GenerateResult):
            record_of(client, end)
    graph = ServedGraph("killed", None, 60)
    while len(graph.broadcast_each("prefix_hits")) < 2:  # until Serve has replaced it
        time.sleep(0.2)
    again = client.generate_batch(wanted())
    for result, record in zip(again, records, strict=True):
        np.testing.assert_array_equal(record_of(client, result).ids, record.ids)
    remove("killed")


@pytest.mark.usefixtures("cluster")
def test_a_session_stays_with_its_prefix_cache(sparse: Path) -> None:
    client = served("talks", sparse, replicas=2, enable_prefix_caching=True)
    for talk in range(4):
        tokens = [3 + talk, *range(10, 50)]
        for turn in range(4):
            result = client.generate(
                GenerateRequest(
                    request_id=f"{talk}-{turn}",
                    input_ids=tokens,
                    session=f"talk {talk}",
                    max_new_tokens=24,
                    temperature=0,
                    ignore_eos=True,
                    return_routed_experts=True,
                )
            )
            assert result.num_routed_tokens == len(tokens) + 23
            tokens = [*tokens, *result.output_ids, 7, 8]
    hits = ServedGraph("talks", None, 30).broadcast("prefix_hits")
    # Three later turns of each talk find all whole blocks of the turn before.
    assert sum(hits) >= 4 * (48 + 80 + 96)
    remove("talks")
