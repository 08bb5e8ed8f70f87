"""The decoder: whole batches, one rank's slice, many turns, many keys.

    python -m benchmarks.decode [--quick] [--repeat N] [--parts shapes,grid,turns,keys]

Prints one JSON line a shape or part. Every time is a median of interleaved rounds, and a promise a
ratio of two of them; promises about bytes are exact.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from benchmarks.harness.cluster import own_ray, serve_decoder, start
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Path, Target, Times, interleaved
from benchmarks.harness.rollouts import RolloutEngine, Rollouts, Shape
from benchmarks.harness.routes import random_routes
from benchmarks.harness.upstream import SharedStore
from serve_app.client import RoutedExpertsClient
from serve_app.types import ExpertBatch, RankSlice, RoutedSequence

APP = "decode"
EXPERTS = 128
SHAPES = "64x4096x48x8,8x32768x48x8,1024x1536x48x8"
QUICK_SHAPES = "8x512x48x8"
TURNS, TURN_ROWS = 50, 512
GRID = RankSlice(4, cp_size=2, layers=tuple(range(12, 24)))
"""A quarter of 48 layers, half of each sequence."""
LEAST = RankSlice(128, cp_size=64, layers=(12,))
"""Next to nothing of every sequence: what a call costs before it moves any bytes."""

SHAPE_TARGETS = (
    Target("local_vs_memcpy", "local", "memcpy", most=2),
    Target("local_vs_memcpy_reused", "local_reused", "memcpy_reused", most=2),
    Target("decoder_vs_memcpy", "decoder", "memcpy", most=5),
)
# Widening writes eight times the bytes: its baseline is the same widening, by numpy alone.
WIDE_TARGETS = (
    Target("local_int64_vs_widening", "local_int64", "widening", most=2),
    Target("decoder_int64_vs_widening", "decoder_int64", "widening", most=5),
)
GRID_TARGETS = tuple(
    Target(f"{where}_rank{wide}_vs_whole", f"{where}_rank{wide}", f"{where}{wide}", most=0.5)
    for wide in ("", "_int64")
    for where in ("local", "decoder")
)
KEY_TARGETS = (Target("one_call_vs_twenty", "one_call", "twenty_calls", most=1),)


def put(shape: Shape) -> Rollouts:
    return Rollouts.put(APP, shape, start(RolloutEngine, shape, EXPERTS))


def shape_line(shape: Shape, repeat: int) -> dict[str, Any]:
    """Keys to one tensor, here and through the decoder, beside numpy's copy of the same arrays."""
    rollouts = put(shape)
    arrays = [rollouts.client.get(str(sequence.key)).ids for sequence in rollouts.sequences]
    reused = np.full(shape.packed, 0, np.uint8)
    out = rollouts.read(where="local")(None).ids
    narrow = [
        Path("memcpy", lambda _: _copied(arrays, np.empty_like(reused))),
        Path("memcpy_reused", lambda _: _copied(arrays, reused)),
        Path("local", rollouts.read(where="local")),
        Path("local_reused", rollouts.read(where="local", out=out)),
        Path("decoder", rollouts.read(where="decoder")),
    ]
    times = interleaved(narrow, repeat, touched_bytes=2 * reused.nbytes)
    targets = {target.name: target.judge(times) for target in SHAPE_TARGETS}
    wide = [
        Path("widening", lambda _: _copied(arrays, np.empty(shape.packed, np.int64))),
        Path("local_int64", rollouts.read(where="local", dtype="int64")),
        Path("decoder_int64", rollouts.read(where="decoder", dtype="int64")),
    ]
    # Enough rounds of 8 times the bytes; more of them say nothing new.
    times |= interleaved(wide, max(2, repeat // 2), touched_bytes=8 * reused.nbytes)
    targets |= {target.name: target.judge(times) for target in WIDE_TARGETS}
    rollouts.release()
    return {
        "part": "shapes",
        "shape": str(shape),
        "bytes": reused.nbytes,
        "ms": {name: found.summary() for name, found in times.items()},
        "targets": targets,
    }


def grid_line(shape: Shape, repeat: int) -> dict[str, Any]:
    """One rank of layers/4 x cp 2, beside the whole batch, as stored and as int64.

    ``least`` stands beside them: what of either does not depend on the slice.
    """
    rollouts = put(shape)
    whole = rollouts.read(where="local")(None)
    part = rollouts.read(where="local", rank=GRID)(None)
    times: dict[str, Times] = {}
    dtypes: tuple[dict[str, Any], ...] = {}, {"dtype": "int64"}
    for dtype, wide, rounds in zip(
        dtypes, ("", "_int64"), (repeat, max(2, repeat // 2)), strict=True
    ):
        paths = [
            Path(f"{where}{name}{wide}", rollouts.read(where=where, **how, **dtype))
            for where in ("local", "decoder")
            for name, how in (("", {}), ("_rank", {"rank": GRID}), ("_least", {"rank": LEAST}))
        ]
        touched = (8 if wide else 2) * whole.ids.nbytes
        times |= interleaved(paths, rounds, touched_bytes=touched)
    share = part.ids.nbytes / whole.ids.nbytes
    rollouts.release()
    return {
        "part": "grid",
        "shape": str(shape),
        "bytes": {"whole": whole.ids.nbytes, "rank": part.ids.nbytes},
        "ms": {name: found.summary() for name, found in times.items()},
        "targets": {
            "bytes_to_a_rank": {"ratio": round(share, 4), "target": "<= 1/8", "met": share <= 1 / 8}
        }
        | {target.name: target.judge(times) for target in GRID_TARGETS},
    }


def turns_line(turns: int) -> dict[str, Any]:
    """Bytes that a conversation moves until the trainer has its routes, after each turn."""
    ours, upstream = list(_our_turns(turns)), list(_upstream_turns(turns))
    half = turns // 2
    grows = {"ours": ours[-1] / ours[half - 1], "upstream": upstream[-1] / upstream[half - 1]}
    return {
        "part": "turns",
        "rows_a_turn": TURN_ROWS,
        "bytes_after_turn": {
            str(turn): {"ours": ours[turn - 1], "upstream": upstream[turn - 1]}
            for turn in sorted({1, half, turns})
        },
        "targets": {
            "twice_the_turns_ours": {
                "ratio": round(grows["ours"], 2),
                "target": "1.9 to 2.1 (linear)",
                "met": 1.9 <= grows["ours"] <= 2.1,
            },
            "twice_the_turns_upstream": {"ratio": round(grows["upstream"], 2), "target": "beside"},
        },
    }


def _turn(number: int) -> Any:
    return random_routes((TURN_ROWS, 48, 8), EXPERTS, seed=number)


def _our_turns(turns: int) -> Iterator[int]:
    """Each turn puts its own rows; the trainer reads the newest key."""
    client = RoutedExpertsClient(APP)
    key: str | None = None
    before = client.stats().live_bytes
    for number in range(turns):
        key = client.put(
            _turn(number), num_experts=EXPERTS, start=number * TURN_ROWS, parent=key, tag="turns"
        )
        batch = client.materialize([RoutedSequence(key, (number + 1) * TURN_ROWS)])
        yield client.stats().live_bytes - before + batch.ids.nbytes
    client.release(tag="turns")


def _upstream_turns(turns: int) -> Iterator[int]:
    """Each turn's engine recaptures the whole as uint16; the worker fetches it, keeps the new."""
    store = start(SharedStore)
    moved, kept = 0, list[ray.ObjectRef[Any]]()
    for number in range(turns):
        whole = np.concatenate([_turn(at) for at in range(number + 1)]).astype(np.uint16)
        fetched = ray.get(store.get.remote(ray.get(store.put.remote(whole))))
        kept.append(ray.put(fetched[number * TURN_ROWS :]))
        moved += whole.nbytes + fetched.nbytes
        trained = sum(part.nbytes for part in ray.get(kept))
        yield moved + trained


def keys_line(shape: Shape, repeat: int) -> dict[str, Any]:
    """2,000 keys in one call, beside 20 calls of 100."""
    rollouts = put(shape)
    client, sequences, each = rollouts.client, rollouts.sequences, shape.count // 20

    def twenty(_: Any) -> list[ExpertBatch]:
        parts = (sequences[at : at + each] for at in range(0, shape.count, each))
        return [client.materialize(part, where="local") for part in parts]

    paths = [Path("one_call", rollouts.read(where="local")), Path("twenty_calls", twenty)]
    times = interleaved(paths, repeat, touched_bytes=2 * int(np.prod(shape.packed)))
    rollouts.release()
    return {
        "part": "keys",
        "shape": str(shape),
        "ms": {name: found.summary() for name, found in times.items()},
        "targets": {target.name: target.judge(times) for target in KEY_TARGETS},
    }


def _copied(arrays: Sequence[Any], target: Any) -> Any:
    at = 0
    for array in arrays:
        np.copyto(target[at : at + len(array)], array)
        at += len(array)
    return target


def lines(parts: Sequence[str], shapes: Sequence[Shape], repeat: int, quick: bool) -> Iterator[Any]:
    if "shapes" in parts:
        for shape in shapes:
            yield shape_line(shape, repeat)
    if "grid" in parts:
        for shape in shapes:
            yield grid_line(shape, repeat)
    if "turns" in parts:
        yield turns_line(4 if quick else TURNS)
    if "keys" in parts:
        for rows in (8,) if quick else (64, 256):  # bytes in the shard; objects
            yield keys_line(Shape(200 if quick else 2000, rows, 48, 8), repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the decoder.")
    parser.add_argument("--parts", default="shapes,grid,turns,keys")
    parser.add_argument("--shapes", help=f"countxrowsxlayersxtop_k,...; default {SHAPES}")
    parser.add_argument("--repeat", type=int, help="rounds; default 15, quick 3")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    options = parser.parse_args()
    repeat = options.repeat or (3 if options.quick else 15)
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    about = {"benchmark": "decode", "machine": describe(), "versions": versions()}
    with own_ray(object_store_bytes=5 << 30):
        serve_decoder(APP)
        asked = [Shape.parse(shape) for shape in shapes.split(",")]
        for line in lines(options.parts.split(","), asked, repeat, options.quick):
            emit({**about, "repeat": repeat, **line})


if __name__ == "__main__":
    main()
