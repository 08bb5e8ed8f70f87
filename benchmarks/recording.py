"""What recording adds to a decode step of LMDeploy: operators, copies to the host, Python time.

    python -m benchmarks.recording [--quick] [--steps N] [--sequences 64,256] [--parts step,python]

On a CPU; prints one JSON line a part. ``off``: the engine records nothing; ``theirs``: it records
in LMDeploy's own way; ``ours``: with what the adapter changes. ``step`` is the real engine with 48
layers on the CPU operators of tests/lmdeploy: what is dispatched in a decode step's forward pass,
beyond what ``off`` dispatches for the same tokens, and which outputs are copied to the host, waited
for one by one or queued behind the step. ``python`` is LMDeploy's real loop over its sequences with
a model that takes no time: CPU time of this thread a step, rollouts that begin and end one after
another, the modes' steps in turn.
"""

import argparse
import asyncio
import ctypes
import gc
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.harness.lines import emit, only_lines
from benchmarks.harness.lmdeploy_engine import without_cuda
from benchmarks.harness.machine import describe, versions
from examples.tiny_moe import write_checkpoint

NARROW: dict[str, Any] = {"hidden": 32, "layers": 48, "experts": 32, "top_k": 8}
QUICK: dict[str, Any] = NARROW | {"layers": 6}
MODES = ("off", "theirs", "ours")
SHAPES = {"short": (256, 256), "long": (4096, 256)}
Line = dict[str, Any]


async def step(model: Path, prompts: list[list[int]], new: int) -> Line:
    """Return what a decode step runs in each mode."""
    from benchmarks.cost.watched import NO_KERNEL, Watched, lmdeploys_own_way

    engines: dict[str, Any] = {}
    routes: dict[str, Any] = {}
    for mode in MODES:
        recording = mode != "off"
        if mode == "ours":
            engines[mode] = Watched(model, recording, recording)
        else:
            with lmdeploys_own_way():
                engines[mode] = Watched(model, recording, recording)
        routes[mode] = await engines[mode].run(prompts, new)
    for ours, theirs in zip(routes["ours"], routes["theirs"], strict=True):
        assert (ours == theirs).all()
    off = engines["off"].per_step()
    added: dict[str, Line] = {}
    for mode in MODES[1:]:
        found = engines[mode].per_step()
        more = {name: found.get(name, 0) - off.get(name, 0) for name in {*found, *off}}
        more = {name: round(count, 2) for name, count in sorted(more.items()) if count}
        added[mode] = {
            "operators": round(sum(more.values()), 2),
            "kernels": round(sum(n for name, n in more.items() if name not in NO_KERNEL), 2),
            "by_name": more,
        }
    return {
        "part": "step",
        "sequences": len(prompts),
        "added": added,
        "copies_to_host": {mode: dict(engines[mode].copies) for mode in MODES},
        "kernels_ours_over_theirs": round(added["ours"]["kernels"] / added["theirs"]["kernels"], 3),
    }


def python(count: int, shape: str, prefix_caching: bool, steps: int) -> Line:
    """Return the Python time of a step in each mode."""
    from benchmarks.cost.bookkeeping import Steady
    from serve_app.engines.lmdeploy.sequence import keep_rows

    prompt, new = SHAPES[shape]
    loops: dict[str, Any] = {
        mode: Steady(
            keep_rows if mode == "ours" else lambda _: None,
            count,
            prompt,
            new,
            prefix_caching,
            records=mode != "off",
        )
        for mode in MODES
    }
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    gc.collect()
    for number in range(steps):
        for mode in MODES[number % 3 :] + MODES[: number % 3]:
            found[mode].append(loops[mode].step() * 1e3)
    spent = {mode: fmean(one) for mode, one in found.items()}
    added = {mode: spent[mode] - spent["off"] for mode in MODES[1:]}
    return {
        "part": "python",
        "sequences": count,
        "prompt": prompt,
        "new_tokens": new,
        "prefix_caching": prefix_caching,
        "steps": steps,
        "ms_a_step": {mode: round(one, 3) for mode, one in spent.items()},
        "median_ms_a_step": {mode: round(median(one), 3) for mode, one in found.items()},
        "added_ms_a_step": {mode: round(one, 3) for mode, one in added.items()},
        "off_over_theirs": round(spent["off"] / spent["theirs"], 3),
        "off_over_ours": round(spent["off"] / spent["ours"], 3),
        "added_ours_over_theirs": round(added["ours"] / added["theirs"], 3),
    }


def measure(path: Path, options: argparse.Namespace) -> Iterator[Line]:
    parts = options.parts.split(",")
    if "step" in parts:
        shape = QUICK if options.quick else NARROW
        rng = random.Random(0)
        prompts = [[rng.randrange(3, 256) for _ in range(12)] for _ in range(4)]
        model = write_checkpoint(path / "narrow", **shape)
        yield {"model": shape} | asyncio.run(step(model, prompts, 4 if options.quick else 12))
    if "python" in parts:
        for count in map(int, options.sequences.split(",")):
            for shape in options.shapes.split(","):
                for prefix_caching in (True, False):
                    yield python(count, shape, prefix_caching, options.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take apart what recording costs LMDeploy.")
    parser.add_argument("--parts", default="step,python")
    parser.add_argument("--sequences", help="decoding at once; default 64,256; quick 8")
    parser.add_argument("--shapes", default="short,long", help="of rollouts: short, long (prompts)")
    parser.add_argument("--steps", type=int, help="of each loop; default 300, quick 20")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    options = parser.parse_args()
    options.sequences = options.sequences or ("8" if options.quick else "64,256")
    options.steps = options.steps or (20 if options.quick else 300)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as path, only_lines():
        without_cuda()
        keep_memory()
        for line in measure(Path(path), options):
            about: Line = {"benchmark": "recording"}
            emit(about | line | {"machine": describe(), "versions": versions()})


def keep_memory() -> None:
    """Keep freed memory in this process.

    A virtual machine may take several times as long as another one for a page that it gives out.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


if __name__ == "__main__":
    main()
