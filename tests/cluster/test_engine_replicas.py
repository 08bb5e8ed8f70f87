"""Two engine replicas on two nodes: what one began another goes on with, and all are told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from serve_app import GenerateRequest, GenerateResult, RoutedExpertsClient, RoutedSequence
from serve_app.client.served import ENGINE, STORE, ServedGraph
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.deployments.store import ExpertStore
from serve_app.errors import EngineAsleep
from serve_app.store.keys import parse
from serve_app.store.owner.directory import remove_actors

APP = "replicas"


@pytest.fixture(scope="module")
def graph(app: str, tiny_checkpoint: Path) -> Iterator[ServedGraph]:
    """Engines and store alone: these tests need neither a decoder nor HTTP."""
    args = EngineArgs.model_validate(
        {
            "model": str(tiny_checkpoint),
            "dtype": "float32",
            "enable_return_routed_experts": True,
            "enable_transfer_obj_ref": True,
            "serve": {
                "min_replicas": 2,
                "max_replicas": 2,
                "max_replicas_per_node": 1,
                "num_cpus": 0,
            },
        }
    )
    store = serve.deployment(name=STORE, **StoreArgs().serve.deployment())(ExpertStore)
    engine = serve.deployment(name=ENGINE, **args.deployment())(InferenceEngine)
    bound = engine.bind(args, StoreArgs(), store.bind(StoreArgs()))
    serve.run(bound, name=APP, route_prefix=None)
    yield ServedGraph(APP, None, 60)
    serve.delete(APP)
    remove_actors(APP, 30)


@pytest.fixture
def client(graph: ServedGraph) -> Iterator[RoutedExpertsClient]:
    """The client; a test leaves nothing in the store."""
    found = RoutedExpertsClient(APP)
    yield found
    found.release(tag="test")
    assert found.stats().live_bytes == 0


def request(**fields: Any) -> GenerateRequest:
    defaults = {"input_ids": [5, 6, 7, 8], "max_new_tokens": 6, "ignore_eos": True, "tag": "test"}
    return GenerateRequest.model_validate(
        {**defaults, "return_routed_experts": True, "temperature": 0, **fields}
    )


def key_of(result: GenerateResult) -> str:
    assert result.routed_experts_error is None
    assert isinstance(result.routed_experts, str)
    return result.routed_experts


def node_of(result: GenerateResult) -> str:
    """Return the node whose replica sampled it, where its key's shard is."""
    return parse(key_of(result), APP).shard


def elsewhere(client: RoutedExpertsClient, wanted: GenerateRequest, node: str) -> GenerateResult:
    """Return the request's result from a replica that is not on ``node``."""
    for _ in range(20):
        same = [wanted.model_copy(update={"request_id": f"{index}"}) for index in range(6)]
        for result in client.generate_batch(same):
            if node_of(result) != node:
                return result
    raise AssertionError(f"no replica answers but the one on {node}")


def test_a_rollout_is_resumed_on_another_node(client: RoutedExpertsClient) -> None:
    first = client.generate(request())
    tokens = [5, 6, 7, 8, *first.output_ids, 11, 12]
    resumed = request(input_ids=tokens, continue_from=key_of(first))
    second = elsewhere(client, resumed, node_of(first))
    whole = client.generate(request(input_ids=tokens))
    assert second.output_ids == whole.output_ids
    assert second.num_routed_tokens == len(tokens) + 5
    expected = client.get(key_of(whole)).ids
    np.testing.assert_array_equal(client.get(key_of(second)).ids, expected)
    client.release([key_of(first)])  # the other node has what it needs
    batch = client.materialize([RoutedSequence(key_of(second), len(tokens) + 6)], where="local")
    np.testing.assert_array_equal(batch.ids[:-1].numpy(), expected)
    third = [*tokens, *second.output_ids, 13]
    back = elsewhere(
        client, request(input_ids=third, continue_from=key_of(second)), node_of(second)
    )
    assert back.num_routed_tokens == len(third) + 5


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_reach_every_replica(
    client: RoutedExpertsClient, graph: ServedGraph, level: Any
) -> None:
    before = client.generate(request())
    client.sleep(level)
    assert graph.broadcast("is_sleeping") == [True, True]
    for answer in graph.broadcast_each("generate", request()):
        assert isinstance(getattr(answer, "cause", answer), EngineAsleep)
    client.wake()
    assert graph.broadcast("is_sleeping") == [False, False]
    results = graph.broadcast("generate", request())
    assert [result.output_ids for result in results] == [before.output_ids] * 2
    assert len({node_of(result) for result in results}) == 2


def test_every_replica_wakes_with_the_newest_weights(
    client: RoutedExpertsClient, graph: ServedGraph, tiny_checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    first = client.generate(request())
    new = {name: -value for name, value in model.state_dict().items()}
    taken = client.update_weights(new, version=3)
    assert sorted(result.version for result in taken) == [3, 3]
    changed = client.generate(request())
    assert changed.output_ids != first.output_ids
    client.sleep(2)
    client.wake()
    assert [version for _, version in graph.broadcast("weight_version")] == [3, 3]
    for result in graph.broadcast("generate", request()):
        assert (result.output_ids, result.weight_version) == (changed.output_ids, 3)
        assert client.get(key_of(result)).weight_version == 3
