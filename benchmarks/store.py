"""The expert store beside upstream's one blocking actor, in one run.

    python -m benchmarks.store [--quick] [--repeat N] [--only reads,round_trips,keys,loop,group]

Prints one JSON line a figure; a promise is a ratio of two interleaved medians. Both stores get
the same bytes (uint8), though upstream's engine would send twice as many. Upstream's read takes the
record away; ours does not, so a round trip is timed without the release and with it.
"""

import argparse
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from benchmarks.harness.cluster import own_ray, start
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Path, Target, Times, Took, interleaved
from benchmarks.harness.producers import Producer
from benchmarks.harness.routes import random_routes
from benchmarks.harness.upstream import SharedStore
from serve_app.config import StoreArgs
from serve_app.continuing import put_continued
from serve_app.records import make_record
from serve_app.records.distinct import repeating_rows, repeating_rows_of_ours
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.owner.directory import open_directory

MB_1_5 = (4096, 48, 8)
MB_12 = (32768, 48, 8)
TINY = (8, 8, 4)
IN_FLIGHT = 8
ASKED_AT_ONCE = 256
GROUP, PROMPT, NEW = 16, 2048, 512
Line = dict[str, Any]


def open_store(app: str, **args: Any) -> ShardStore:
    open_directory(app, StoreArgs.model_validate(args), 30)
    return connect(app)


def make_producers(app: str, shape: tuple[int, int, int], number: int, count: int) -> list[Any]:
    """Start producers that share one of upstream's actors, too."""
    upstream = start(SharedStore)
    made = [start(Producer, shape, count, upstream, seed) for seed in range(number)]
    ray.get([producer.connect.remote(app) for producer in made])
    return made


def reads(repeat: int, quick: bool) -> Iterator[Line]:
    """Read records that nobody has read yet, all at once."""
    store, shape = open_store("reads"), MB_1_5 if quick else MB_12
    (producer,) = make_producers("reads", shape, 1, IN_FLIGHT)
    upstream = start(SharedStore)
    arrays = [np.zeros(shape, np.uint8) for _ in range(IN_FLIGHT)]

    def put() -> list[str]:
        store.release(tag="read")
        keys: list[str] = ray.get(producer.put.remote())
        store.retag(keys, "read")
        return keys

    paths = [
        Path("ours", store.fetch, put),
        Path(
            "upstream",
            lambda keys: ray.get([upstream.get.remote(key) for key in keys]),
            lambda: ray.get([upstream.put.remote(array) for array in arrays]),
        ),
    ]
    times = interleaved(paths, repeat, 3 * IN_FLIGHT * int(np.prod(shape)))
    yield line("reads", times, [Target("upstream_vs_ours", "upstream", "ours", least=5)], shape)


def round_trips(repeat: int, quick: bool) -> Iterator[Line]:
    """Put and read back with 8 records in flight, from 1, 4 and 16 producers at once."""
    open_store("round_trips")
    for shape, least in ((MB_1_5, 4.0), (MB_12, 3.0))[: 1 if quick else 2]:
        for number in (1, 4) if quick else (1, 4, 16):
            producers = make_producers("round_trips", shape, number, IN_FLIGHT)

            def together(method: str, *args: bool, producers: list[Any] = producers) -> Took:
                return Took.over(
                    ray.get([getattr(producer, method).remote(*args) for producer in producers])
                )

            def give_up(producers: list[Any] = producers) -> None:
                ray.get([producer.give_up.remote() for producer in producers])

            paths = [
                Path("ours", lambda _: together("round_trip", False), give_up),
                Path("ours_and_release", lambda _: together("round_trip", True), give_up),
                Path("upstream", lambda _: together("round_trip_upstream")),
            ]
            nbytes = number * IN_FLIGHT * int(np.prod(shape))
            times = interleaved(paths, repeat, min(nbytes, 1 << 29))
            target = Target("upstream_vs_ours", "upstream", "ours", least=least)
            yield line("round_trips", times, [target], shape) | {"producers": number}
            for producer in producers:
                ray.kill(producer)


def keys(repeat: int, quick: bool) -> Iterator[Line]:
    """Put, read and release small records in shards that hold few or very many of them."""
    paths: list[Path] = []
    levels = (1_000, 10_000) if quick else (1_000, 100_000, 1_000_000)
    for level in levels:
        app = f"keys_{level}"
        store = open_store(app)
        (producer,) = make_producers(app, TINY, 1, 1)
        # As many different keys at every level, or what remembers parsed keys serves them unalike.
        known: list[str] = ray.get(producer.fill.remote(level, levels[0]))
        assert store.stats().live_keys == level
        paths += _paths_of_keys(store, producer, known, level)
    times = interleaved(paths, 3 * repeat, 1 << 20)
    targets = [
        Target(f"{what}_{level}_vs_{levels[0]}", f"{what}_{level}", f"{what}_{levels[0]}", most=1.2)
        for what in ("put", "get", "release")
        for level in levels[1:]
    ]
    yield line("keys", times, targets, TINY) | {"keys_a_call": ASKED_AT_ONCE}


def _paths_of_keys(store: ShardStore, producer: Any, known: list[str], level: int) -> list[Path]:
    fresh: list[str] = []

    def put(_: object = None) -> list[str]:
        fresh[:] = ray.get(producer.fill.remote(ASKED_AT_ONCE, ASKED_AT_ONCE))
        return fresh

    return [
        Path(f"put_{level}", put, lambda: store.release(fresh)),
        Path(
            f"get_{level}",
            store.fetch,
            lambda: random.sample(known, min(len(known), ASKED_AT_ONCE)),
        ),
        Path(f"release_{level}", store.release, put),
    ]


def loop(repeat: int, quick: bool) -> Iterator[Line]:
    """How long the producer's loop stands still in a put, beyond what it does when idle."""
    open_store("loop")
    for shape in (MB_1_5,) if quick else (MB_1_5, MB_12):
        (producer,) = make_producers("loop", shape, 1, 1)
        blocked: dict[str, list[float]] = {"ours": [], "blocking": [], "idle": []}
        for kind in blocked:
            ray.get(producer.blocked.remote(kind, 3))
        for number in range(3 * repeat):
            for kind in blocked if number % 2 else reversed(blocked):
                blocked[kind] += ray.get(producer.blocked.remote(kind, 5))
        base = Times(blocked["idle"]).median
        added = {kind: [one - base for one in worst] for kind, worst in blocked.items()}
        times = {kind: Times(found) for kind, found in added.items()}
        found = line(
            "loop", times, [Target("blocking_vs_ours", "blocking", "ours", least=10)], shape
        )
        for kind, worst in added.items():
            for percent in (50, 99):
                found["ms"][kind][f"p{percent}"] = round(float(np.percentile(worst, percent)), 2)
        yield found
        ray.kill(producer)


def group(repeat: int, quick: bool) -> Iterator[Line]:
    """Bytes of a group whose members share their prompt's rows, and of one that shares none."""
    ids = random_routes((PROMPT + NEW - 1, 48, 8), 128)
    held = {}
    for shared in (False, True):
        store = open_store(f"group_{shared}")
        record = make_record(ids, num_experts=128)
        parent = store.put(make_record(ids[:PROMPT], num_experts=128)) if shared else None
        members = [
            put_continued(store, record, parent).key if parent else store.put(record)
            for _ in range(GROUP)
        ]
        if parent:
            store.release([parent])
        for found in store.fetch(members):
            assert isinstance(found, list)
            assert (np.concatenate([part.ids for part in found]) == ids).all()
        held[shared] = store.stats().live_bytes
        store.release(members)
    share = held[True] / held[False]
    target = {"ratio": round(share, 4), "target": "<= 0.3", "met": share <= 0.3}
    yield line("group", {}, [], ids.shape) | {
        "bytes": {"shared": held[True], "unshared": held[False]},
        "targets": {"shared_vs_unshared": target},
    }


def distinct(repeat: int, quick: bool) -> Iterator[Line]:
    """Look for rows that were never routed in a record of an engine, beside its put.

    ``foreign`` is the look at every id, which records of others get.
    """
    app, shape = "distinct", MB_1_5 if quick else MB_12
    open_store(app)
    (producer,) = make_producers(app, shape, 1, 1)
    ids, layers = random_routes(shape, 128), range(shape[1])
    paths = [
        Path("put", lambda _: ray.get(producer.put.remote())),
        Path("ours", lambda _: repeating_rows_of_ours(ids, layers)),
        Path("foreign", lambda _: repeating_rows(ids, layers)),
    ]
    times = interleaved(paths, repeat, 3 * int(np.prod(shape)))
    yield line(app, times, [Target("check_vs_put", "ours", "put", most=0.05)], shape)


def line(what: str, times: dict[str, Times], targets: list[Target], shape: tuple[int, ...]) -> Line:
    """Return one line of output."""
    return {
        "benchmark": "store",
        "what": what,
        "shape": list(shape),
        "machine": describe(),
        "versions": versions(),
        "ms": {name: found.summary() for name, found in times.items()},
        "targets": {target.name: target.judge(times) for target in targets},
    }


FIGURES = {
    "group": group,
    "reads": reads,
    "loop": loop,
    "round_trips": round_trips,
    "keys": keys,
    "distinct": distinct,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the store beside upstream's actor.")
    parser.add_argument("--only", default=",".join(FIGURES), help="which figures; default all")
    parser.add_argument("--repeat", type=int, help="rounds; default 9, quick 3")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    options = parser.parse_args()
    repeat = options.repeat or (3 if options.quick else 9)
    with own_ray(object_store_bytes=(1 if options.quick else 8) << 30):
        for name in options.only.split(","):
            for found in FIGURES[name](repeat, options.quick):
                emit(found)


if __name__ == "__main__":
    main()
