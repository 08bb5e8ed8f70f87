"""Scenarios that need a cluster of their own; a test runs one in its own process.

    python -m tests.cluster.nodes.fault_scenarios NAME

Prints one JSON object of what was seen, for the test to judge.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
    RAY_health_check_timeout_ms="1000",
)

import numpy as np
import ray
from ray._private.internal_api import memory_summary
from ray.cluster_utils import Cluster

from serve_app.config import StoreArgs
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.owner.directory import open_directory
from tests.cluster.nodes.actors import EngineLike, start
from tests.store_contract import LARGE, read, record

Seen = dict[str, Any]


def open_store(**args: Any) -> ShardStore:
    open_directory("faults", StoreArgs.model_validate(args), 30)
    return connect("faults")


def node_killed() -> Seen:
    """Kill a node hard; ask for a key of it and one of another until the answer is final."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"a": 9}})
    doomed = cluster.add_node(num_cpus=0, resources={"b": 9})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        store = open_store()
        (lost,) = ray.get(start(EngineLike, "b").put.remote("faults", [1]))
        kept = store.put(record(LARGE, seed=2))
        cluster.remove_node(doomed, allow_graceful=False)
        answers, longest_s, tick = [], 0.0, threading.Event()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "RoutesLost" not in answers:
            begun = time.monotonic()
            found, also = store.fetch([lost, kept])
            longest_s = max(longest_s, time.monotonic() - begun)
            answers.append(type(found).__name__)
            assert isinstance(also, list)
            np.testing.assert_array_equal(also[0].ids, record(LARGE, seed=2).ids)
            tick.wait(0.05)
        return {
            "answers": answers,
            "longest_s": longest_s,
            "released": store.release([lost, kept]),
        }
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def spilled() -> Seen:
    """Put twice what the object store holds, then read it all."""
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            address="local",
            object_store_memory=80 << 20,
            object_spilling_directory=folder,
            include_dashboard=False,
            log_to_driver=False,
        )
        try:
            store = open_store(byte_budget=1 << 30)
            shape = (20_000, 48, 8)
            keys = [store.put(record(shape, seed=seed)) for seed in range(20)]
            held = store.stats().live_bytes
            address = ray.get_runtime_context().gcs_address
            summary: str = memory_summary(address, stats_only=True)  # type: ignore[no-untyped-call]
            wrong = [
                seed
                for seed, key in enumerate(keys)
                if not np.array_equal(read(store, key)[0].ids, record(shape, seed=seed).ids)
            ]
            released = store.release(keys)
            return {
                "held": held,
                "spilled": "Spilled" in summary,
                "wrong": wrong,
                "released": released,
                "left": store.stats().live_bytes,
            }
        finally:
            ray.shutdown()


SCENARIOS: dict[str, Callable[[], Seen]] = {"node_killed": node_killed, "spilled": spilled}


if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]]()), flush=True)
