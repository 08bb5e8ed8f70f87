"""What survives what: the rows that a chaos run cannot pin down, each under its name."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from serve_app.errors import KeyExpired, RoutesLost, StoreUnavailable
from serve_app.store.access.client import ShardStore
from serve_app.store.owner.directory import find_shard, list_shards, this_node
from tests.cluster.nodes.actors import EngineLike, pid_of, start
from tests.store_contract import LARGE, SMALL, MakeStore, expire, read, record

ROOT = Path(__file__).parents[2]
HANG_S = 60


def run_scenario(name: str) -> dict[str, Any]:
    """Run one of `fault_scenarios` in a process, and so in a cluster, of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.cluster.nodes.fault_scenarios", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    seen: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return seen


def wait_for(reached: Callable[[], bool], what: str) -> None:
    deadline, tick = time.monotonic() + HANG_S, threading.Event()
    while not reached():
        assert time.monotonic() < deadline, f"{what} did not happen"
        tick.wait(0.1)


def test_shard_process_killed_old_keys_are_lost_and_every_other_key_reads(
    make_store: MakeStore,
) -> None:
    store = make_store()
    (other,) = ray.get(start(EngineLike, "engines").put.remote("contract", [1]))
    lost = store.put(record(LARGE, seed=2))
    shard = find_shard("contract", this_node())
    assert shard is not None
    os.kill(pid_of(shard), signal.SIGKILL)
    answers: list[object] = []

    def is_final() -> bool:
        found, kept = store.fetch([lost, other])
        assert isinstance(kept, list)
        np.testing.assert_array_equal(kept[0].ids, record(LARGE, seed=1).ids)
        answers.append(found)
        return not isinstance(found, StoreUnavailable)  # while the process restarts

    wait_for(is_final, "a final answer")
    assert isinstance(answers[-1], RoutesLost)
    later = store.put(record(LARGE, seed=3))
    np.testing.assert_array_equal(read(store, later)[0].ids, record(LARGE, seed=3).ids)


def test_node_killed_calls_end_with_unavailable_until_ray_knows_then_with_lost() -> None:
    seen = run_scenario("node_killed")
    assert seen["answers"][-1] == "RoutesLost"
    assert set(seen["answers"][:-1]) <= {"StoreUnavailable"}
    assert seen["longest_s"] < HANG_S
    assert seen["released"] == 1


def test_spilled_records_read_back() -> None:
    seen = run_scenario("spilled")
    assert seen["held"] == 20 * 20_000 * 48 * 8
    assert seen["spilled"]
    assert seen["wrong"] == []
    assert (seen["released"], seen["left"]) == (20, 0)


def test_nobody_ever_fetches_a_key_its_lease_ends_and_its_bytes_come_back(
    make_store: MakeStore,
) -> None:
    store = make_store()
    keys = [store.put(record(shape), lease_s=0.2) for shape in (SMALL, LARGE)]
    expire(store, keys=0)
    wait_for(lambda: store.stats().live_bytes == 0, "the return of the bytes")
    (shard,) = store.stats().shards
    assert (shard.expired, shard.released) == (2, 0)
    for key in keys:
        with pytest.raises(KeyExpired):
            read(store, key)


@ray.remote(num_cpus=0)
class Aborted:
    """An engine whose every rollout is aborted: it puts partial records that nobody reads."""

    def __init__(self, app: str) -> None:
        from serve_app.store.access.client import connect

        self._store: ShardStore = connect(app, ray.get_runtime_context().current_actor)

    async def storm(self, count: int) -> int:
        shapes = [(SMALL, SMALL, SMALL, LARGE)[number % 4] for number in range(count)]
        puts = [self._store.aput(record(shape), lease_s=1) for shape in shapes]
        return len(await asyncio.gather(*puts))


def test_abort_storm_leaves_no_live_bytes(make_store: MakeStore) -> None:
    store = make_store(app="storm", byte_budget=100 << 20)
    engine: Any = Aborted.options(resources={"trainer": 1}).remote("storm")  # type: ignore[attr-defined]
    puts = sum(ray.get([engine.storm.remote(500) for _ in range(4)], timeout=240))
    assert puts == 2000
    wait_for(lambda: store.stats().live_bytes == 0, "the end of 2,000 leases")
    (shard,) = store.stats().shards
    assert (shard.live_keys, shard.expired, shard.waiting_puts) == (0, 2000, 0)


def test_shards_leave_when_their_application_is_gone_and_their_leases_are_over(
    make_store: MakeStore,
) -> None:
    store = make_store(app="leaving", leave_after_s=0.5)
    store.put(record(LARGE), lease_s=1)
    assert list_shards("leaving") == [this_node()]
    wait_for(lambda: list_shards("leaving") == [], "the shard's leave")
    # Ray keeps a name it has looked up until this process, too, has heard of the actor's death
    wait_for(lambda: find_shard("leaving", this_node()) is None, "the news of it")
    assert store.stats().shards == ()
