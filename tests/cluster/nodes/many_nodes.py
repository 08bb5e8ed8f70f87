"""Six raylets that come and go: engines, a decoder, trainers and the head on nodes of their own.

    python -m tests.cluster.nodes.many_nodes

Prints one JSON object of what was seen, for the test to judge.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.update(
    # In a runtime environment every worker would have to be a new process.
    PYTHONPATH=str(Path(__file__).parents[3]),
    RAY_AUTH_MODE="disabled",
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
    RAY_health_check_timeout_ms="1000",
)

import numpy as np
import ray
from ray import serve

from graphs.store import build
from serve_app import RankSlice, RoutedExpertsClient, RoutedSequence
from serve_app.config import StoreGraphArgs
from serve_app.errors import KeyReleased, R3Error, RoutesLost, StoreUnavailable
from tests.cluster.nodes.actors import EngineLike, start
from tests.cluster.nodes.raylets import Nodes
from tests.store_contract import LARGE, record

APP = "wide"
EACH = 16
ROWS, LAYERS, TOP_K = LARGE
LIVE = 24
HANG_S = 90


@ray.remote(num_cpus=0)
class Rank:
    """One trainer rank: asks for its slice and compares it with what was put."""

    def __init__(self) -> None:
        self._client = RoutedExpertsClient(APP)

    def slice(self, keys: list[str], seeds: list[int], pipeline: int, context: int) -> int:
        """Materialize half of the layers and half of each sequence; return the answer's bytes."""
        layers = tuple(range(pipeline * LAYERS // 2, (pipeline + 1) * LAYERS // 2))
        rank = RankSlice(4, cp_size=2, cp_rank=context, layers=layers)
        sequences = [RoutedSequence(key, ROWS) for key in keys]
        batch = self._client.materialize(sequences, rank=rank, where="decoder")
        whole = np.stack([record(LARGE, seed=seed).ids for seed in seeds])
        chunks = whole.reshape(len(seeds), 4, ROWS // 4, LAYERS, TOP_K)
        expected = chunks[:, [context, 3 - context]][..., list(layers), :]
        np.testing.assert_array_equal(batch.ids.numpy(), expected.reshape(batch.ids.shape))
        assert bool(batch.valid.all())
        return batch.ids.numel() + batch.valid.numel()

    def read(self, key: str, seed: int) -> str:
        """Read one key; say ``right``, ``wrong``, or the error's name."""
        try:
            batch = self._client.materialize([RoutedSequence(key, ROWS)])
        except R3Error as error:
            return type(error).__name__
        same = np.array_equal(batch.ids.numpy(), record(LARGE, seed=seed).ids)
        return "right" if same else "wrong"


def locality(nodes: Nodes, engines: Sequence[Any]) -> dict[str, Any]:
    """Four ranks on two nodes ask for their slices; count what each object store was given."""
    ranks: list[Any] = [start(Rank, f"trainers-{1 + number // 2}") for number in range(4)]

    def put(seeds: Sequence[int]) -> list[str]:
        """Put every other record on the one engine node, the others on the other one."""
        halves = [list(seeds[0::2]), list(seeds[1::2])]
        puts = [engine.put.remote(APP, some) for engine, some in zip(engines, halves, strict=True)]
        return list(chain.from_iterable(zip(*ray.get(puts, timeout=HANG_S), strict=True)))

    def ask(keys: list[str], seeds: list[int]) -> list[int]:
        asked = [
            rank.slice.remote(keys, seeds, number // 2, number % 2)
            for number, rank in enumerate(ranks)
        ]
        return list(ray.get(asked, timeout=HANG_S))

    warm = put(range(2))
    ask(warm, [0, 1])  # connections, and what is sent once
    seeds = list(range(2, 2 + 2 * EACH))
    at_start = nodes.written()
    keys = put(seeds)
    after_puts = nodes.written()
    slices = ask(keys, seeds)
    after_reads = nodes.written()
    received, deadline = nodes.received(), time.monotonic() + HANG_S
    while min(received["trainers-1"], received["trainers-2"]) < sum(slices) / 2:
        assert time.monotonic() < deadline, received
        time.sleep(1)
        received = nodes.received()
    RoutedExpertsClient(APP).release([*warm, *keys])
    return {
        "payload": 2 * EACH * ROWS * LAYERS * TOP_K,
        "slices": slices,
        "put": {name: after_puts[name] - at_start[name] for name in at_start},
        "read": {name: after_reads[name] - after_puts[name] for name in at_start},
        "received": received,
    }


class Load:
    """Producers on every engine node and readers on both trainer nodes, until told to stop."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.violations: list[str] = []
        self.live: dict[str, tuple[str, int]] = {}
        self._released: set[str] = set()
        self._seeds = iter(range(1000, 1 << 30))
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def run(self, work: Callable[..., None], *args: Any) -> None:
        """Do something in a thread, again and again, until told to stop."""

        def again() -> None:
            while not self.stop.wait(0.05):
                work(*args)

        self._threads.append(threading.Thread(target=again, daemon=True))
        self._threads[-1].start()

    def produce(self, node: str, engine: Any) -> None:
        """Put four records on a node; release the oldest ones."""
        with self._lock:
            seeds = [next(self._seeds) for _ in range(4)]
        try:
            keys = ray.get(engine.put.remote(APP, seeds), timeout=HANG_S)
        except ray.exceptions.RayError:
            return  # its node is gone
        with self._lock:
            self.live.update({k: (node, seed) for k, seed in zip(keys, seeds, strict=True)})
            old = [key for key, (at, _) in self.live.items() if at == node][:-LIVE]
            self._released |= set(old)
            for key in old:
                del self.live[key]
        RoutedExpertsClient(APP).release(old)

    def read(self, rank: Any, rng: random.Random) -> None:
        """Read any live key; note how it ended."""
        with self._lock:
            if not self.live:
                return
            key, (node, seed) = rng.choice(list(self.live.items()))
        outcome = ray.get(rank.read.remote(key, seed), timeout=HANG_S)
        self.outcomes[node, outcome] += 1
        promised = outcome in ("right", "StoreUnavailable", "DecoderUnavailable")
        lost = outcome == RoutesLost.__name__ and node == "engines-2"
        if not promised and not lost and not self._was_released(key, outcome):
            self.violations.append(f"{outcome} for a key on {node}")

    def _was_released(self, key: str, outcome: str) -> bool:
        with self._lock:
            return outcome == KeyReleased.__name__ and key in self._released

    def wait_for(self, node: str, outcome: str, more: int) -> None:
        """Wait until reads of a node's keys ended so, so many times more."""
        goal, deadline = self.outcomes[node, outcome] + more, time.monotonic() + HANG_S
        while self.outcomes[node, outcome] < goal:
            assert time.monotonic() < deadline, f"{outcome} of {node}: {dict(self.outcomes)}"
            self.stop.wait(0.1)

    def end(self) -> None:
        """Stop and wait."""
        self.stop.set()
        for thread in self._threads:
            thread.join(HANG_S)
            assert not thread.is_alive(), "a call hangs"


def churn(nodes: Nodes, engines: Sequence[Any]) -> dict[str, Any]:
    """Under load: one node more, one drained, one killed."""
    load = Load()
    for number, engine in enumerate(engines, 1):
        load.run(load.produce, f"engines-{number}", engine)
    for number in (1, 2):
        rank: Any = start(Rank, f"trainers-{number}")
        load.run(load.read, rank, random.Random(number))
    load.wait_for("engines-1", "right", 5)
    load.wait_for("engines-2", "right", 5)

    nodes.add("engines-3")
    load.run(load.produce, "engines-3", start(EngineLike, "engines-3"))
    load.wait_for("engines-3", "right", 5)

    nodes.remove("decoders", gracefully=True)
    load.wait_for("engines-1", "right", 10)

    nodes.remove("engines-2", gracefully=False)
    load.wait_for("engines-2", RoutesLost.__name__, 3)
    for survivor in ("engines-1", "engines-3"):
        load.wait_for(survivor, "right", 10)
    load.end()

    client = RoutedExpertsClient(APP)
    ended, deadline = 0, time.monotonic() + HANG_S
    while True:
        try:
            ended = client.release(list(load.live))
            break
        except StoreUnavailable:
            assert time.monotonic() < deadline
    return {
        "outcomes": {f"{node} {what}": count for (node, what), count in load.outcomes.items()},
        "violations": load.violations,
        "released": ended,
        "left": client.stats().live_bytes,
    }


def main() -> None:
    nodes = Nodes()
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        near = {"min_replicas": 5, "max_replicas": 5, "max_replicas_per_node": 1, "num_cpus": 0.5}
        args = {"decoder": {"near_wait_s": 30, "serve": near}, "store": {"serve": {"num_cpus": 0}}}
        serve.run(build(StoreGraphArgs.model_validate(args)), name=APP, route_prefix=None)
        engines: list[Any] = [start(EngineLike, f"engines-{number}") for number in (1, 2)]
        seen = {"locality": locality(nodes, engines), "churn": churn(nodes, engines)}
        print(json.dumps(seen), flush=True)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        nodes.cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
