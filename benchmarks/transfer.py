"""From keys to a tensor: ours, plain memcpy, and upstream's path, in one run.

    python -m benchmarks.transfer [--quick] [--repeat N] [--shapes 64x4096x48x8,...]

Prints one JSON line a shape. Every figure is a median of interleaved rounds; a promise is a ratio
of two of them. Baselines copy from arrays in the same shared memory into the same kind of
destination (new, or reused as ``out=``). Upstream's keys are destroyed by reading, so its samples
are put again before each round, outside its time.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.harness.cluster import own_ray, serve_decoder, start
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Path, Target, Times, interleaved
from benchmarks.harness.rollouts import RolloutEngine, Shape
from benchmarks.harness.upstream import RolloutWorker, SharedStore, trainer_tensor
from serve_app.client import RoutedExpertsClient
from serve_app.types import RoutedSequence

APP = "transfer"
SHAPES = "64x4096x48x8,8x32768x48x8,256x1024x48x8"
QUICK_SHAPES = "8x512x48x8"
# JSON of 100 MB takes most of a minute: only the first 1/16 of each sample is measured.
JSON_SHARE = 16
JSON_PATH = f"json_int64_at_1_{JSON_SHARE}"

TARGETS = (
    Target("local_vs_memcpy_new", "local_new", "memcpy_new", most=2),
    Target("local_vs_memcpy_reused", "local_reused", "memcpy_reused", most=2),
    Target("decoder_vs_memcpy", "decoder", "memcpy_new", most=5),
    Target("upstream_vs_local", "upstream_int64", "local_new", least=15),
    Target("upstream_vs_local_int64", "upstream_int64", "local_int64", least=3),
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """The actors of upstream's path, and the engine that feeds both sides."""

    engine: Any
    store: Any
    worker: Any

    def put(self) -> list[str]:
        keys: list[str] = ray.get(self.engine.put_upstream.remote(self.store))
        return keys

    def by_key(self, keys: list[str]) -> torch.Tensor:
        return trainer_tensor(ray.get(self.worker.by_key.remote(keys)))

    def from_body(self, kind: str) -> torch.Tensor:
        return trainer_tensor(ray.get(self.worker.from_body.remote(kind)))


def measure(shape: Shape, num_experts: int, repeat: int) -> dict[str, Times]:
    """Put one shape's records both ways and time every path to a tensor of them."""
    engine = start(RolloutEngine, shape, num_experts)
    store = start(SharedStore)
    upstream = Upstream(engine, store, start(RolloutWorker, store))
    client = RoutedExpertsClient(APP)
    keys = ray.get(engine.put.remote(APP))
    paths = _paths(client, keys, upstream, shape)
    _check_equal(paths, shape)
    # The most that a path allocates: int64 of everything, twice (upstream's trainer).
    times = interleaved(paths, repeat, touched_bytes=16 * int(np.prod(shape.packed)))
    client.release(keys)
    return times


def _paths(
    client: RoutedExpertsClient, keys: list[str], upstream: Upstream, shape: Shape
) -> list[Path]:
    arrays = [client.get(key).ids for key in keys]
    sequences = [RoutedSequence(key, length=shape.rows) for key in keys]
    # Both destinations of one kind: np.full takes huge pages where np.zeros does not.
    reused = np.full(shape.packed, 0, arrays[0].dtype)
    out = torch.from_numpy(reused.copy())

    ray.get(upstream.worker.receive.remote("base64", upstream.put()))
    ray.get(upstream.worker.receive.remote("json", upstream.put(), JSON_SHARE))
    return [
        Path("memcpy_new", lambda _: _copied(arrays, np.empty_like(reused))),
        Path("memcpy_reused", lambda _: _copied(arrays, reused)),
        Path("local_new", lambda _: client.materialize(sequences, where="local").ids),
        Path("local_reused", lambda _: client.materialize(sequences, where="local", out=out).ids),
        Path("decoder", lambda _: client.materialize(sequences, where="decoder").ids),
        Path("upstream_int64", upstream.by_key, upstream.put, every=3),
        Path(
            "local_int64",
            lambda _: client.materialize(sequences, where="local", dtype="int64").ids,
        ),
        Path("base64_int64", lambda _: upstream.from_body("base64"), every=5),
        Path(JSON_PATH, lambda _: upstream.from_body("json"), every=5),
    ]


def _copied(arrays: Sequence[Any], target: Any) -> torch.Tensor:
    at = 0
    for array in arrays:
        np.copyto(target[at : at + len(array)], array)
        at += len(array)
    return torch.from_numpy(target)


def _check_equal(paths: Sequence[Path], shape: Shape) -> None:
    """Make sure that all paths end in the same ids, or in the JSON's share of them."""
    whole: Any = paths[0].run(None)
    part = whole.reshape(shape.count, *shape.each)[:, : shape.rows // JSON_SHARE].flatten(0, 1)
    for path in paths:
        expected = part if path.name == JSON_PATH else whole
        found: Any = path.run(path.prepare())
        assert torch.equal(found.to(expected.dtype), expected), f"{path.name} gave other ids"


def report(shape: Shape, num_experts: int, repeat: int, times: dict[str, Times]) -> dict[str, Any]:
    """Return one line of output."""
    return {
        "benchmark": "transfer",
        "shape": str(shape),
        "num_experts": num_experts,
        "bytes": int(np.prod(shape.packed)) * (1 if num_experts <= 256 else 2),
        "repeat": repeat,
        "machine": describe(),
        "versions": versions(),
        "ms": {name: found.summary() for name, found in times.items()},
        "targets": {target.name: target.judge(times) for target in TARGETS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time ways from keys to a tensor.")
    parser.add_argument("--shapes", help=f"countxrowsxlayersxtop_k,...; default {SHAPES}")
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--repeat", type=int, help="rounds; default 15, quick 3")
    parser.add_argument("--quick", action="store_true", help="one small shape: does it run?")
    options = parser.parse_args()
    repeat = options.repeat or (3 if options.quick else 15)
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    with own_ray(object_store_bytes=4 << 30):
        serve_decoder(APP)
        for shape in map(Shape.parse, shapes.split(",")):
            times = measure(shape, options.num_experts, repeat)
            emit(report(shape, options.num_experts, repeat, times))


if __name__ == "__main__":
    main()
