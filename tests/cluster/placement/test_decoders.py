"""Three raylets: bytes are sliced where they lie, and a rank's slice crosses the wire once."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pytest
import ray
import requests
import torch
from ray import serve

from graphs.store import build
from serve_app import AsyncRoutedExpertsClient, RankSlice, RoutedExpertsClient, RoutedSequence
from serve_app.config import StoreGraphArgs
from serve_app.errors import KeyReleased, RoutesGap
from serve_app.records import make_record
from serve_app.store.access.client import connect
from serve_app.store.owner.metrics import LATENCY
from serve_app.types import Where
from tests.cluster.nodes.actors import EngineLike, start
from tests.store_contract import LARGE, MakeStore, record

APP = "placed"
EACH = 24
ROWS = LARGE[0]


@dataclass
class Placed:
    """Records on two nodes without a trainer, and the trainer's client on the third."""

    client: RoutedExpertsClient
    sequences: list[RoutedSequence]
    ids: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def placed(app: str) -> Iterator[Placed]:
    one_a_node = {"min_replicas": 3, "max_replicas": 3, "max_replicas_per_node": 1, "num_cpus": 0}
    args = {"decoder": {"near_wait_s": 60, "serve": one_a_node}}
    serve.run(build(StoreGraphArgs.model_validate(args)), name=APP, route_prefix=None)
    engines = [start(EngineLike, node) for node in ("engines", "elsewhere")]
    seeds = list(range(EACH)), list(range(EACH, 2 * EACH))
    puts = [engine.put.remote(APP, some) for engine, some in zip(engines, seeds, strict=True)]
    # The two nodes' sequences take turns, so neither one's share is a run of rows.
    keys = list(chain.from_iterable(zip(*ray.get(puts), strict=True)))
    ids = [record(LARGE, seed=seed).ids for pair in zip(*seeds, strict=True) for seed in pair]
    client = RoutedExpertsClient(APP)
    yield Placed(client, [RoutedSequence(key, ROWS) for key in keys], np.concatenate(ids))
    client.release(keys)
    assert client.stats().live_bytes == 0
    for engine in engines:
        ray.kill(engine)
    serve.delete(APP)


def rank_of(number: int) -> RankSlice:
    """A quarter of the layers, half of every sequence."""
    return RankSlice(4, cp_size=2, cp_rank=number, layers=tuple(range(12, 24)))


def rows_of(number: int) -> np.ndarray[Any, Any]:
    chunk = np.arange(2 * EACH * ROWS).reshape(2 * EACH, 4, ROWS // 4)
    return chunk[:, [number, 3 - number]].reshape(-1)


def exported(name: str, *tags: str) -> dict[str, float]:
    """A metric's values by node, those with all of these tags added up."""
    values: dict[str, float] = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not node["Alive"]:
            continue
        at = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        lines = requests.get(at, timeout=10).text.splitlines()
        found = [
            line for line in lines if line.startswith(name) and all(tag in line for tag in tags)
        ]
        names = {"trainer", "engines", "elsewhere"} & set(node["Resources"])
        values[names.pop()] = sum(float(line.rpartition(" ")[2]) for line in found)
    return values


def settled(read: Callable[[], dict[str, float]], least: float = 0) -> dict[str, float]:
    """Wait until the sum of what is exported has reached ``least`` and stands still."""
    deadline, tick, before = time.monotonic() + 60, threading.Event(), read()
    while True:
        tick.wait(1.5)
        now = read()
        if now == before and sum(now.values()) >= least:
            return now
        assert time.monotonic() < deadline, f"expected {least} in all, at rest; got {now}"
        before = now


def wire() -> dict[str, float]:
    """Bytes of objects that each node has received from others so far."""
    return exported("ray_object_manager_bytes", 'Type="Received"')


def test_a_ranks_slice_crosses_the_wire_once(placed: Placed) -> None:
    warm = placed.client.materialize(placed.sequences[:2], rank=rank_of(1))
    assert warm.valid.all()
    before = settled(wire)
    batch = placed.client.materialize(placed.sequences, rank=rank_of(0), dtype="int64")
    np.testing.assert_array_equal(batch.ids.numpy(), placed.ids[rows_of(0), 12:24])
    slice_bytes = batch.ids.numel() + batch.valid.numel()
    after = settled(wire, sum(before.values()) + slice_bytes)
    moved = {node: int(after[node] - before[node]) for node in after}
    print(f"payload {placed.ids.nbytes} bytes, the rank's slice {slice_bytes}, received {moved}")
    assert slice_bytes <= moved["trainer"] <= 1.1 * slice_bytes
    assert slice_bytes < placed.ids.nbytes / 8 * 1.1
    assert moved["engines"] + moved["elsewhere"] < 0.1 * slice_bytes


def test_many_ranks_at_once_get_theirs(placed: Placed) -> None:
    def read(number: int) -> None:
        places: tuple[Where, ...] = ("auto", "decoder", "local")
        where = places[number % 3]
        batch = placed.client.materialize(
            placed.sequences, rank=rank_of(number % 2), where=where, pin=number % 4 == 0
        )
        np.testing.assert_array_equal(batch.ids.numpy(), placed.ids[rows_of(number % 2), 12:24])
        assert batch.cu_seqlens.tolist() == list(range(0, (2 * EACH + 1) * ROWS, ROWS))

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(read, range(24)))


def test_out_is_filled_with_what_several_nodes_have(placed: Placed) -> None:
    some, rows = placed.sequences[:3], 3 * ROWS
    out = torch.empty((rows, *LARGE[1:]), dtype=torch.int64)
    batch = placed.client.materialize(some, dtype="int64", out=out)
    assert batch.ids is out
    np.testing.assert_array_equal(out.numpy(), placed.ids[:rows])
    one = placed.client.materialize(some[:1], dtype="int64", out=out[:ROWS])
    assert one.ids.data_ptr() == out.data_ptr()
    with pytest.raises(ValueError, match=r"out must be a writable uint8"):
        placed.client.materialize(some, out=out)


def test_a_gap_and_a_released_key_on_one_node_of_two(placed: Placed) -> None:
    good, short = placed.sequences[0], RoutedSequence(placed.sequences[1].key, ROWS + 5)
    with pytest.raises(RoutesGap, match="rows 600 to 604 were never captured"):
        placed.client.materialize([good, short])
    masked = placed.client.materialize([short, good], on_missing="mask")
    assert [(gap.index, gap.first, gap.count) for gap in masked.missing] == [(0, ROWS, 5)]
    assert masked.valid.tolist() == [True] * ROWS + [False] * 5 + [True] * ROWS
    gone = placed.client.put(record(LARGE).ids, num_experts=128)
    placed.client.release([gone])
    with pytest.raises(KeyReleased):
        placed.client.materialize([good, RoutedSequence(gone, ROWS), placed.sequences[1]])


async def test_micro_batches_come_in_order(placed: Placed) -> None:
    groups = [placed.sequences[at : at + 5] for at in range(0, 2 * EACH, 5)]
    at = 0
    for batch in placed.client.micro_batches(groups):
        np.testing.assert_array_equal(batch.ids.numpy(), placed.ids[at : at + len(batch.ids)])
        at += len(batch.ids)
    assert at == len(placed.ids)
    client = AsyncRoutedExpertsClient(APP)
    sizes = [len(batch.ids) async for batch in client.micro_batches(groups)]
    assert sizes == [5 * ROWS] * 9 + [3 * ROWS]


def test_bytes_that_are_here_need_no_decoder(make_store: MakeStore) -> None:
    make_store(app="undecoded")
    client = RoutedExpertsClient("undecoded", timeout_s=5)
    key = client.put(record(LARGE).ids, num_experts=128)
    batch = client.materialize([RoutedSequence(key, ROWS)])
    np.testing.assert_array_equal(batch.ids.numpy(), record(LARGE).ids)


@ray.remote(num_cpus=0)
class ManyPuts:
    """Puts small records of one row each, as many as are asked for."""

    async def put(self, app: str, rows: list[int]) -> list[str]:
        store = await asyncio.to_thread(connect, app, ray.get_runtime_context().current_actor)
        ids = [np.array([[[row // 128], [row % 128]]]) for row in rows]
        return list(
            await asyncio.gather(*(store.aput(make_record(one, num_experts=128)) for one in ids))
        )


def test_two_thousand_keys_are_one_call_a_shard(make_store: MakeStore) -> None:
    store = make_store(app="many")
    nodes = ("engines", "elsewhere")
    rows = [list(range(at, 2000, 2)) for at in range(2)]
    puts = [
        start(ManyPuts, node).put.remote("many", n) for node, n in zip(nodes, rows, strict=True)
    ]
    keys = list(chain.from_iterable(zip(*ray.get(puts), strict=True)))
    assert store.renew(keys, lease_s=600) == 2000  # knows the shards now, has read nothing
    batch = RoutedExpertsClient("many").materialize(
        [RoutedSequence(key, 1) for key in keys], where="local"
    )
    assert (batch.ids[..., 0].int() @ torch.tensor([128, 1], dtype=torch.int32)).tolist() == list(
        range(2000)
    )
    name = f"{LATENCY}_count"
    calls = settled(lambda: exported(f"ray_{name}", 'app="many"', 'call="read"'), least=2)
    assert calls == {"trainer": 0, "engines": 1, "elsewhere": 1}
