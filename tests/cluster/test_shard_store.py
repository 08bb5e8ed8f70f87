"""The shards keep the store's contract, and their own promises: who owns, what survives."""

import asyncio
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import ray
import requests
from ray.exceptions import ObjectLostError
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.errors import RoutesLost, StoreUnavailable
from serve_app.store.access.client import ShardStore
from serve_app.store.access.reads import ShardReader
from serve_app.store.door import Door
from serve_app.store.keys import Key
from serve_app.store.owner.answers import unpack_described
from serve_app.store.owner.directory import find_shard, this_node
from serve_app.store.owner.metrics import GAUGES, LATENCY, metric_name
from tests.cluster.nodes.actors import EngineLike, pid_of, start
from tests.store_contract import LARGE, SMALL, MakeStore, StoreContract, read, record


class TestShardStore(StoreContract):
    """Everything a `RecordStore` promises, on real shards."""


def test_records_outlive_the_actor_that_produced_them(make_store: MakeStore) -> None:
    store = make_store()
    engine = start(EngineLike, "trainer")
    keys = ray.get(engine.put.remote("contract", [1, 2, 3]))
    ray.kill(engine)
    for seed, key in zip([1, 2, 3], keys, strict=True):
        np.testing.assert_array_equal(read(store, key)[0].ids, record(LARGE, seed=seed).ids)


def test_records_put_together_come_back_as_one_object(make_store: MakeStore) -> None:
    make_store()
    engine = start(EngineLike, "trainer")
    keys = ray.get(engine.put.remote("contract", list(range(12))))
    shard = find_shard("contract", this_node())
    assert shard is not None
    answer: Any = ray.get(shard.read.remote(keys))
    assert len(answer.refs) < len(keys) / 2


def test_a_cancelled_call_takes_no_others_records_with_it(make_store: MakeStore) -> None:
    """Ray cancels what a call has called; a batch carries the records of many calls."""
    size = record(LARGE).meta.nbytes
    store = make_store(byte_budget=3 * size)
    fillers = [store.put(record(LARGE)) for _ in range(3)]
    engine = start(EngineLike, "trainer")

    def queued(puts: int) -> None:
        deadline = time.monotonic() + 60
        while store.stats().shards[0].waiting_puts != puts:
            assert time.monotonic() < deadline

    first = engine.put_in_turn.remote("contract", [1, 2])  # its first put waits for room
    queued(1)
    second = engine.put_in_turn.remote("contract", [3])
    queued(2)
    third = engine.put_in_turn.remote("contract", [4])  # waits for a batch to join
    ray.get(engine.node.remote())
    store.release(fillers[:1])
    deadline = time.monotonic() + 60
    while store.stats().shards[0].puts != 4:  # then the third's batch follows the first's
        assert time.monotonic() < deadline
    queued(2)
    ray.cancel(first)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(first, timeout=60)
    store.release(fillers)
    for seed, ref in ((3, second), (4, third)):
        (key,) = ray.get(ref, timeout=60)
        np.testing.assert_array_equal(read(store, key)[0].ids, record(LARGE, seed=seed).ids)


def test_a_key_put_on_another_node_reads_here(make_store: MakeStore) -> None:
    store = make_store()
    engine = start(EngineLike, "elsewhere")
    (key,) = ray.get(engine.put.remote("contract", [5]))
    assert ray.get(engine.node.remote()) != this_node()
    assert isinstance(store, ShardStore)
    assert not store.is_local(key)
    np.testing.assert_array_equal(read(store, key)[0].ids, record(LARGE, seed=5).ids)
    assert len(store.stats().shards) == 1


def test_keys_of_a_killed_shard_are_lost_and_the_others_read(make_store: MakeStore) -> None:
    store = make_store()
    far = start(EngineLike, "engines")
    (kept,) = ray.get(far.put.remote("contract", [1]))
    lost = [store.put(record(shape)) for shape in (SMALL, LARGE)]
    shard = find_shard("contract", this_node())
    assert shard is not None
    os.kill(pid_of(shard), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(isinstance(answer, StoreUnavailable) for answer in store.fetch(lost)):
        assert time.monotonic() < deadline, "the shard did not come back"  # may be retried
    found = store.fetch([kept, *lost])
    assert [type(answer) for answer in found] == [list, RoutesLost, RoutesLost]
    assert store.release([kept, *lost]) == 1
    assert read(store, store.put(record(LARGE, seed=9)))[0].ids.shape == LARGE


async def test_a_shard_has_a_door_on_its_node(make_store: MakeStore) -> None:
    store = make_store()
    keys = [store.put(record(shape)) for shape in (SMALL, LARGE)]
    shard = find_shard("contract", this_node())
    assert shard is not None
    identity: Any = ray.get(shard.identity.remote(), timeout=60)
    door = Door(identity.door)
    found = unpack_described(await asyncio.wait_for(door.call("describe", keys), 60))
    door.close()
    assert found == store.describe(keys)
    assert [[meta.rows for meta in chain] for chain in found] == [[SMALL[0]], [LARGE[0]]]


def test_the_callers_work_is_done_once_and_its_error_ends_the_read(make_store: MakeStore) -> None:
    store = make_store()
    keys = [store.put(record(shape)) for shape in (SMALL, LARGE)]
    made_up = Key("contract", "0" * 10, 1, 1).sign(b"other")
    done: list[int] = []
    found = store.fetch([*keys, made_up], meanwhile=lambda: done.append(1))
    assert [isinstance(answer, list) for answer in found] == [True, True, False]
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        store.fetch(keys, meanwhile=lambda: 1 // 0)
    assert [isinstance(answer, list) for answer in store.fetch(keys)] == [True, True]


def test_an_engine_that_knew_a_killed_shard_puts_into_the_next(make_store: MakeStore) -> None:
    store = make_store()
    engine = start(EngineLike, "trainer")
    lost = ray.get(engine.hold_a_conversation.remote(3), timeout=60)
    assert [segment.meta.start for segment in read(store, lost[-1])] == [0, 20, 40]
    shard = find_shard("contract", this_node())
    assert shard is not None
    os.kill(pid_of(shard), signal.SIGKILL)
    kept = ray.get(engine.hold_a_conversation.remote(3), timeout=60)
    assert [type(answer) for answer in store.fetch([*lost, *kept])] == [RoutesLost] * 3 + [list] * 3
    np.testing.assert_array_equal(read(store, kept[-1])[2].ids, record(SMALL, seed=2).ids)
    assert store.release([*lost, *kept]) == 3


def test_status_shows_every_shard(make_store: MakeStore) -> None:
    store = make_store()
    store.put(record(LARGE))
    shown = CliRunner().invoke(main, ["store", "status", "contract"], env={"COLUMNS": "250"})
    assert shown.exit_code == 0
    assert this_node() in shown.output
    assert f"{record(LARGE).meta.nbytes:,}" in shown.output
    missing = CliRunner().invoke(main, ["store", "status", "nobody"])
    assert missing.exit_code == 1
    assert "nobody" in missing.output


def test_every_metric_is_exported(make_store: MakeStore) -> None:
    store = make_store()
    key = store.put(record(LARGE))
    read(store, key)
    store.release([key, store.put(record())])
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    port = next(node for node in nodes if node["NodeID"].startswith(this_node()))
    expected = {f"ray_{metric_name(field)}" for field in (*GAUGES, "puts", "gets", "released")}
    expected.add(f"ray_{LATENCY}_bucket")
    at = f"http://{port['NodeManagerAddress']}:{port['MetricsExportPort']}/metrics"
    deadline, tick = time.monotonic() + 60, threading.Event()
    while missing := expected - exported(requests.get(at, timeout=10).text, 'app="contract"'):
        assert time.monotonic() < deadline, f"not exported: {sorted(missing)}"
        tick.wait(0.5)


def exported(text: str, label: str) -> set[str]:
    """Names of the metrics that have a series with this label."""
    return {line.split("{")[0] for line in text.splitlines() if label in line}


class Owner:
    """Owns an object that never comes: no node has what its task asks for."""

    def own(self) -> "list[ray.ObjectRef[None]]":
        task: Any = ray.remote(lambda: None)
        return [task.options(num_cpus=0, resources={"nowhere": 1}).remote()]


def lost_object() -> "ray.ObjectRef[Any]":
    """Return a reference to an object that Ray knows to be lost: its owner died."""
    made: Any = ray.remote(Owner)
    owner = made.options(num_cpus=0).remote()
    (ref,) = ray.get(owner.own.remote(), timeout=30)
    ray.kill(owner)
    with pytest.raises(ObjectLostError):
        ray.get(ref, timeout=60)
    return ref  # type: ignore[no-any-return]


def test_bytes_that_are_gone_from_this_node_are_lost_and_said_so(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    gone, kept = (store.put(record(LARGE, seed=seed)) for seed in (1, 2))
    lost, read_shards = lost_object(), ShardReader._read
    answers = []

    def losing_the_first(self: ShardReader, *args: Any) -> Any:
        reading = read_shards(self, *args)
        answers.append(len(reading.refs))
        return reading._replace(refs=[lost, *reading.refs[1:]])

    monkeypatch.setattr(ShardReader, "_read", losing_the_first)
    found, other = store.fetch([gone, kept])
    assert answers == [2, 2], "the shard is asked anew for bytes that this node does not have"
    assert isinstance(found, RoutesLost)
    assert isinstance(other, list)
    assert np.array_equal(other[0].ids, record(LARGE, seed=2).ids)
