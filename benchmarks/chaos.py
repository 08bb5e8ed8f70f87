"""Kill what can be killed while the store is used, and check every answer.

    python -m benchmarks.chaos [--minutes N] [--seed S]

A cluster of three raylets serves store and decoders. Engine-like producers, readers (local and
through decoders), releases, renewals and aborts keep it busy while a producer, a decoder replica,
a shard process and a raylet are killed, in an order that the seed draws. In the end every answer
was bitwise right or an error that the design's table promises, no call hung, nothing is live, and
Ray's object stores are back at their start. Prints one JSON line; exits with 1 on a violation.
"""

import argparse
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# A dead node is noticed in about 4 s. Ray reads this when it is loaded.
os.environ.update(
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
    RAY_health_check_timeout_ms="1000",
)

import ray
from ray import serve
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

from benchmarks.harness.book import HANG_S, Book
from benchmarks.harness.lines import emit, only_lines
from benchmarks.harness.load import LEASE_S, Producing, Reading
from benchmarks.harness.machine import describe, versions
from graphs.store import build
from serve_app.client import RoutedExpertsClient
from serve_app.config import DecoderArgs, StoreArgs, StoreGraphArgs
from serve_app.errors import StoreError
from serve_app.serve_options import ServeOptions
from serve_app.store.owner.directory import find_shard, list_shards

APP = "chaos"
NODES = ("head", "left", "right")
STORE_BYTES = 400 << 20
SLACK_BYTES = 1 << 20
SETTLE_S = 60.0
REPLICA = f"SERVE_REPLICA::{APP}#ExpertDecoder#"


class Chaos:
    """The cluster, the load on it, and the hand that kills."""

    def __init__(self, cluster: Cluster, book: Book, seed: int) -> None:
        self._cluster, self._book = cluster, book
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        client = RoutedExpertsClient(APP, timeout_s=20)
        client.stats()
        self._client = client
        self._producing = [
            Producing(APP, node, book, seed + at, self._stop) for at, node in enumerate(NODES)
        ]
        self._reading = [Reading(client, book, seed + 10 + at, self._stop) for at in range(3)]

    def run(self, seconds: float) -> None:
        """Load the store for so long and kill something of each kind, again and again."""
        for thread in (*self._producing, *self._reading):
            thread.start()
        faults = [self.kill_engine, self.kill_decoder, self.kill_shard, self.kill_raylet]
        pause_s = min(10.0, seconds / (len(faults) + 1))
        until, drawn = time.monotonic() + seconds, list[Callable[[], None]]()
        try:
            while time.monotonic() + pause_s < until or drawn:
                self._stop.wait(pause_s)
                drawn = drawn or self._rng.sample(faults, len(faults))
                self._book.trouble(time.monotonic())
                fault = drawn.pop()
                fault()
                self._book.trouble(time.monotonic())
                self._book.count(fault.__name__)
            self._stop.wait(max(0.0, until - time.monotonic()))
        finally:
            self._stop.set()
            self._join()

    def _join(self) -> None:
        for thread in (*self._producing, *self._reading):
            thread.join(2 * HANG_S)
            if thread.is_alive():
                self._book.violate(f"{thread.name} hangs")

    def kill_engine(self) -> None:
        os.kill(_pid(self._rng.choice(self._producing).engine), signal.SIGKILL)

    def kill_decoder(self) -> None:
        named = ray.util.list_named_actors(all_namespaces=True)
        replicas = [actor for actor in named if actor["name"].startswith(REPLICA)]
        ray.kill(ray.get_actor(**self._rng.choice(replicas)))

    def kill_shard(self) -> None:
        shard = self._rng.choice([name for name in list_shards(APP) if name in _live_nodes()])
        pid, begun = _pid(find_shard(APP, shard)), time.monotonic()
        self._book.kill(shard, begun, float("inf"))
        os.kill(pid, signal.SIGKILL)
        _wait_for("the shard's end", lambda: not Path(f"/proc/{pid}/status").exists())
        self._book.kill(shard, begun, time.monotonic())

    def kill_raylet(self) -> None:
        """Kill a node hard, and start another one like it once Ray knows."""
        node, begun = (
            self._rng.choice(sorted(self._cluster.worker_nodes, key=_name)),
            time.monotonic(),
        )
        shard, name = str(node.node_id)[:10], _name(node)
        # For good: its processes may take puts until they notice that their raylet is gone.
        self._book.kill(shard, begun, float("inf"))
        self._cluster.remove_node(node, allow_graceful=False)
        _wait_for("the node to be declared dead", lambda: shard not in _live_nodes())
        add_node(self._cluster, name)

    def settle(self) -> None:
        """Ask once more for every key, release all, and wait until nothing is live."""
        reader = self._reading[0]
        for entry in list(self._book.entries.values()):
            _wait_for("a final answer", partial(reader.read, entry))
        _wait_for("the last release", self._release_all)
        _wait_for("the last lease's end", self._is_empty)

    def _release_all(self) -> bool:
        try:
            self._client.release([entry.key for entry in self._book.entries.values()])
        except StoreError:
            return False
        return True

    def _is_empty(self) -> bool:
        stats = self._client.stats()
        return not (stats.live_keys or stats.live_bytes or stats.unreachable)


def add_node(cluster: Cluster, name: str) -> None:
    """Start a node that has a resource of this name."""
    cluster.add_node(num_cpus=0, resources={name: 100}, object_store_memory=STORE_BYTES)


def used_bytes() -> int:
    """Return what all object stores hold, as their raylets count it."""
    stats = [
        node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False)  # type: ignore[no-untyped-call]
        for node in _live_nodes().values()
    ]
    return sum(found.store_stats.object_store_bytes_used for found in stats)


def held() -> list[str]:
    """Say which processes hold objects of some size: what `ray memory` shows."""
    said = list[str]()
    for node in _live_nodes().values():
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], True)  # type: ignore[no-untyped-call]
        said += [
            f"{_name_of(worker.pid)}: {ref.object_size} bytes, {ref.local_ref_count} references,"
            f" pinned {ref.pinned_in_memory}, {ref.call_site}"
            for worker in stats.core_workers_stats
            for ref in worker.object_refs
            if ref.object_size > SLACK_BYTES // 16
        ]
    return said


def _name_of(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    title = path.read_text().split("\0")[0] if path.exists() else "gone"
    return f"{title} ({pid})"


def _live_nodes() -> dict[str, Any]:
    nodes: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"][:10]: node for node in nodes if node["Alive"]}


def _name(node: Any) -> str:
    return next(name for name in NODES if name in _live_nodes()[node.node_id[:10]]["Resources"])


def _pid(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=HANG_S))


def _wait_for(what: str, reached: Callable[[], bool]) -> None:
    deadline, tick = time.monotonic() + SETTLE_S + LEASE_S, threading.Event()
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {SETTLE_S + LEASE_S} s for {what}")
        tick.wait(0.1)


def serve_store() -> None:
    """Serve store and two decoder replicas on the head node."""
    store = StoreArgs(byte_budget=64 << 20, lease_s=LEASE_S, put_timeout_s=4, call_timeout_s=10)
    decoders = ServeOptions(min_replicas=2, max_replicas=2, max_ongoing_requests=8)
    serve.start(proxy_location="Disabled")
    graph = build(StoreGraphArgs(store=store, decoder=DecoderArgs(serve=decoders)))
    serve.run(graph, name=APP, route_prefix=None)


def chaos(minutes: float, seed: int) -> dict[str, Any]:
    """Run it all on the cluster that this process is connected to; return what to print."""
    head = {
        "num_cpus": 4,
        "resources": {NODES[0]: 100},
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
    }
    cluster, book = Cluster(initialize_head=True, head_node_args=head), Book()
    try:
        for name in NODES[1:]:
            add_node(cluster, name)
        ray.init(address=cluster.address, log_to_driver=False)
        serve_store()
        run = Chaos(cluster, book, seed)
        before = used_bytes()
        run.run(60 * minutes)
        try:
            run.settle()
            gc.collect()  # errors that Ray and Serve keep in cycles, with what their frames hold
            _wait_for("the object stores", lambda: used_bytes() <= before + SLACK_BYTES)
        except TimeoutError as error:
            book.violate(f"{error}: {'; '.join(held())}")
        return {
            "benchmark": "chaos",
            "minutes": minutes,
            "seed": seed,
            "machine": describe(),
            "versions": versions(),
            "keys": len(book.entries),
            "counts": dict(sorted(book.counts.items())),
            "longest_call_s": round(book.longest_s, 2),
            "object_store_bytes": {"before": before, "after": used_bytes()},
            "violations": len(book.violations),
            "examples": book.violations[:10],
        }
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill parts of the store's cluster under load.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with only_lines():
        found = chaos(options.minutes, options.seed)
    emit(found)
    sys.exit(bool(found["violations"]))


if __name__ == "__main__":
    main()
