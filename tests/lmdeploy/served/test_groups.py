"""Engine groups on several nodes: where their members are, what they sample, how they are lost."""

import asyncio
import base64
import functools
import math
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from benchmarks.storm import EXPERTS, blow
from examples.tiny_moe import write_checkpoint
from serve_app import RoutedExpertsClient
from serve_app.client.served import ENGINE
from serve_app.errors import InvalidRequest
from serve_app.store.access.client import connect
from serve_app.types import GenerateRequest
from serve_app.weights.parts import BroadcastPart, GroupSpec, PickledPart
from tests.engine_contract import mixed_requests
from tests.eventually import eventually
from tests.lmdeploy.served.graphs import remove, served
from tests.lmdeploy.served.group_faults import kill, lose_a_member, lose_a_node, stop
from tests.lmdeploy.served.pretended_gpus import TWO_NODES, add_node, remove_node
from tests.lmdeploy.served.replica import ServedReplica
from tests.lmdeploy.served.replicas import members, places
from tests.ports import free_ports
from tests.trainers_group import broadcast, open_as_rank_0

KINDS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tp": 2, "transfer": "lmdeploy", "num_gpu_blocks": 70},
    "expert parallel": {
        "dp": 2,
        "ep": 2,
        "transfer": "lmdeploy",
        "enable_prefix_caching": True,
        "num_gpu_blocks": 70,
    },
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    return write_checkpoint(path, hidden=32, layers=2, experts=EXPERTS, top_k=2)


@pytest.fixture(scope="module", params=KINDS)
def group(
    request: pytest.FixtureRequest, cluster: Cluster, small: Path
) -> Iterator[tuple[str, RoutedExpertsClient]]:
    """A group that spans two nodes, neither of them the head."""
    name = request.param.replace(" ", "-")
    kwargs = KINDS[request.param] | {"liveness_timeout_s": 10.0}
    sizes = {"context_length": 2048, "max_batch_size": 16}
    yield name, served(name, small, bundles=TWO_NODES, **sizes, **kwargs)
    remove(name)


def test_each_worker_has_a_gpu_and_a_node_of_its_own(
    group: tuple[str, RoutedExpertsClient],
) -> None:
    name, client = group
    found = places(members(name)[-2:])
    assert len({node for node, _ in found}) == 2
    head = ray.get_runtime_context().get_node_id()
    assert head not in {node for node, _ in found}
    results = client.generate_batch(mixed_requests(8))
    holding = [shard for shard in client.stats().shards if shard.live_keys]
    ranks = KINDS[name.replace("-", " ")].get("dp", 1)
    assert len(holding) == ranks  # each beside the engine that made the records
    client.release([str(one.routed_experts) for one in results])


async def test_five_hundred_rollouts_have_exactly_their_rows(
    group: tuple[str, RoutedExpertsClient], small: Path
) -> None:
    """With aborts, stops, resumes, groups and two weight updates."""
    name, client = group
    before = await asyncio.to_thread(client.generate_batch, mixed_requests(4))
    replica, store = ServedReplica(name), connect(name)
    sizes = {"lengths": (1, 2, 9, 40, 200), "most_new": 10}
    seen = await blow(replica, store, small, requests=500, seed=1, **sizes)
    kinds = ("length", "stop", "abort", "closed", "fresh", "resumed", "replayed_alone")
    assert all(seen[kind] for kind in kinds), seen
    client.release([str(one.routed_experts) for one in before])
    if name == "expert-parallel":
        assert await replica.call("prefix_hits") > 0


def test_rollouts_that_lose_their_blocks_are_as_if_alone(
    group: tuple[str, RoutedExpertsClient],
) -> None:
    name, client = group
    replica = ServedReplica(name)
    wanted = [_request(150, first, routes=True) for first in range(16)]
    alone = [client.generate(one) for one in wanted[:2]]
    before = replica.now("recomputed")
    results = client.generate_batch(wanted)
    assert replica.now("recomputed") > before  # there are blocks for half of them
    for one, other in zip(alone, results, strict=False):
        assert one.output_ids == other.output_ids
        ids, others = (client.get(str(each.routed_experts)).ids for each in (one, other))
        np.testing.assert_array_equal(ids, others)
    client.release([str(one.routed_experts) for one in (*alone, *results)])


async def test_weights_come_in_parts_to_the_workers(
    group: tuple[str, RoutedExpertsClient], small: Path
) -> None:
    """Pickled for each worker, then from a trainer whose ranks 1 and 2 the workers are."""
    replica = ServedReplica(group[0])
    name, version = await replica.call("weight_version")
    named = list(load_file(small / "model.safetensors").items())
    data = base64.b64encode(pickle.dumps(named)).decode()
    assert await replica.call("add_weights", PickledPart([data, data])) == len(named)
    with pytest.raises(InvalidRequest, match="one for each of 2 workers, got 3"):
        await replica.call("add_weights", PickledPart([data] * 3))
    taken = await replica.call("commit_weights", version + 1, name)
    assert taken.version == version + 1
    first = await replica.generate(_request(8))
    (port,) = free_ports(1)
    policy = f"policy of {name}"
    spec = GroupSpec("127.0.0.1", port, 1, 3, policy, "gloo")
    joining = asyncio.create_task(replica.call("join_weights_group", spec, [name], 60.0))
    trainer = await asyncio.to_thread(open_as_rank_0, port, policy, 3)
    await joining
    part = BroadcastPart(
        policy,
        [each for each, _ in named],
        [str(value.dtype).removeprefix("torch.") for _, value in named],
        [list(value.shape) for _, value in named],
    )
    found = []
    for number, by in ((2, 0.5), (3, 1.0)):
        receiving = asyncio.create_task(replica.call("add_weights", part))
        sent = [(each, value * by) for each, value in named]
        await asyncio.to_thread(broadcast, trainer, sent)
        assert await receiving == len(named)
        await replica.call("commit_weights", version + number, name)
        found.append(await replica.generate(_request(8)))
    await replica.call("leave_weights_group", policy)
    assert [one.weight_version for one in found] == [version + 2, version + 3]
    assert found[0].logprobs != pytest.approx(first.logprobs, abs=1e-3)
    assert found[1].output_ids == first.output_ids


def test_a_rank_gives_up_what_nobody_waits_for(group: tuple[str, RoutedExpertsClient]) -> None:
    """Whoever calls by a plain handle tells nobody that it leaves: Serve alone does."""
    name, client = group
    handle = serve.get_deployment_handle(ENGINE, name).options(_by_reference=True)
    before = client.stats().live_keys
    wanted = [_request(900, first, routes=True) for first in range(3)]
    stream: Any = handle.options(stream=True).stream.remote(wanted[0])
    assert next(iter(stream)).result is None
    calls: list[Any] = [
        handle.generate.remote(wanted[1]),
        handle.generate_group.remote(wanted[2], 2),
    ]
    assert eventually(lambda: handle.ongoing.remote().result(timeout_s=30) == 3)
    for call in (stream, *calls):
        call.cancel()
    assert eventually(lambda: handle.ongoing.remote().result(timeout_s=30) == 0)
    # An engine that went on would be at it for longer than it takes another to be sampled.
    client.release([str(client.generate(_request(8, routes=True)).routed_experts)])
    assert handle.abort.remote(None).result(timeout_s=30) == 0
    assert eventually(lambda: client.stats().live_keys == before)


def test_ranks_sample_equally_much(group: tuple[str, RoutedExpertsClient]) -> None:
    """16 clients, lengths drawn log-uniformly from 16 to 512, no sessions."""
    name, _ = group
    if name == "tensor-parallel":
        assert len(members(name)) == 2  # one engine: nothing to spread over
        return
    replica, dice = ServedReplica(name), random.Random(4)
    before = replica.now("sampled")

    async def client(count: int) -> None:
        for _ in range(count):
            length = int(math.exp(dice.uniform(math.log(16), math.log(512))))
            await replica.generate(_request(length))

    async def all_clients() -> None:
        await asyncio.gather(*(client(4) for _ in range(16)))

    asyncio.run(all_clients())
    after = replica.now("sampled")
    counts = [after[rank] - before[rank] for rank in range(2)]
    assert max(counts) <= 1.1 * min(counts), counts


def test_a_lost_member_is_the_groups_end_and_nothing_elses(
    group: tuple[str, RoutedExpertsClient],
) -> None:
    """Killed or stopped; ``python -m benchmarks.groups`` does both to both, many times."""
    name, client = group
    harm = kill if name == "tensor-parallel" else stop
    lose_a_member(client, name, harm, random.Random(2))


def test_a_lost_node_is_the_groups_end_until_there_is_another(
    group: tuple[str, RoutedExpertsClient], cluster: Cluster
) -> None:
    name, client = group
    lose = functools.partial(remove_node, cluster, "small")
    lose_a_node(client, name, lose, functools.partial(add_node, cluster, "small"))


def _request(length: int, first: int = 3, *, routes: bool = False) -> GenerateRequest:
    return GenerateRequest(
        input_ids=[first, *range(4, 23)],
        max_new_tokens=length,
        temperature=0,
        ignore_eos=True,
        return_routed_experts=routes,
    )
