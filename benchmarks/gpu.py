"""LMDeploy on a GPU: what recording and keys cost, step by step, and what a key gives.

    python -m benchmarks.gpu [--quick] [--repeat N] [--concurrent 64,128,256] [--parts ...]

``profile``: engines alone, in turn: tokens a second, and a profile of a decode step. ``off``
records nothing, ``unasked`` is not asked, ``theirs`` is asked and records in LMDeploy's own way,
``asked`` as the adapter has it. ``together`` and ``steady``: the whole graph (see
`benchmarks.cost.graph` for its five modes); rollouts that begin and end at once, and ones that
begin as others end. ``conversations`` and ``tensors``: turns, and keys to a tensor on the GPU.

The model has Qwen3-30B-A3B's routing (48 layers, 128 experts, 8 a token), random weights, and is
narrow: its steps are short, so what recording adds weighs more than in the real one. Prints one
JSON line a part. Without CUDA, ``--quick`` runs all parts but ``tensors`` on the CPU operators of
tests/lmdeploy, which says whether they run and no more.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from ray import serve

from benchmarks.cost.graph import APPLICATIONS, MODES, Rollouts, a_prompt, application
from benchmarks.cost.profiled import WAYS, ProfiledEngine, compared
from benchmarks.harness.cluster import own_ray
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Target, Times
from examples.tiny_moe import write_checkpoint
from serve_app.client import RoutedExpertsClient
from serve_app.config import EngineArgs
from serve_app.types import RoutedSequence

REAL: dict[str, Any] = {"hidden": 256, "layers": 48, "experts": 128, "top_k": 8}
QUICK: dict[str, Any] = {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4}
PROMPT, TURN, VOCABULARY = 256, 64, 512
PARTS = "profile,together,steady,conversations,tensors"
LEAST = 0.97
"""Of the tokens a second without routes, what routes by key shall leave."""
GRAPH = {"cache_max_entry_count": 0.2}
ON_CPU = {"eager_mode": True, "num_gpu_blocks": 400, "block_size": 16}
Line = dict[str, Any]


def profiled(model: Path, count: int, repeat: int, new: int) -> Line:
    """Return tokens a second and a decode step's parts, engines in turn."""
    cuda = torch.cuda.is_available()
    hosts = {}
    for way in WAYS:
        args = EngineArgs(
            backend="lmdeploy",
            model=str(model),
            dtype="bfloat16" if cuda else "float16",
            max_batch_size=count,
            engine_kwargs=GRAPH if cuda else ON_CPU,
        )
        remote: Any = ray.remote(ProfiledEngine)
        hosts[way] = remote.options(num_cpus=0, num_gpus=0.2 if cuda else 0).remote(args, way)
        ray.get(hosts[way].ready.remote())
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(repeat + 1):
        rng = random.Random(number)
        prompts = [a_prompt(rng, PROMPT) for _ in range(count)]
        for way in list(WAYS)[number % 4 :] + list(WAYS)[: number % 4]:
            speed = ray.get(hosts[way].run.remote(prompts, new))
            if number:  # the first round compiles and warms up
                speeds[way].append(speed)
    steps = {way: ray.get(host.profile.remote(prompts, new)) for way, host in hosts.items()}
    for host in hosts.values():
        ray.kill(host)
    found = {way: median(one) for way, one in speeds.items()}
    return {
        "part": "profile",
        "concurrent": count,
        "tokens_per_s": {way: round(one, 1) for way, one in found.items()},
        "over_off": {way: round(one / found["off"], 3) for way, one in found.items()},
        "a_step": compared(steps),
    }


async def throughput(
    rollouts: Rollouts, counts: Sequence[int], repeat: int, new: int, steady: bool
) -> Line:
    """Return tokens a second by concurrency and mode, medians of interleaved rounds."""
    found: dict[tuple[int, str], list[float]] = {(n, mode): [] for n in counts for mode in MODES}
    for number in range(repeat + 1):
        modes = list(MODES)[number % 5 :] + list(MODES)[: number % 5]
        for count in counts:
            seed = number * 1000 + count
            rng = random.Random(seed)
            prompts = [a_prompt(rng, PROMPT) for _ in range(count)]
            for mode in modes:
                if steady:
                    speed = await rollouts.steadily(mode, seed, PROMPT, new, count)
                else:
                    speed = await rollouts.together(mode, prompts, new)
                if number:  # the first round compiles and warms up
                    found[count, mode].append(speed)
    speeds = {n: {mode: median(found[n, mode]) for mode in MODES} for n in counts}
    over_off = {n: {m: round(s[m] / s["off"], 3) for m in MODES} for n, s in speeds.items()}
    return {
        "part": "steady" if steady else "together",
        "prompt": PROMPT,
        "new_tokens": new,
        "tokens_per_s": {n: {m: round(s[m], 1) for m in MODES} for n, s in speeds.items()},
        "over_off": over_off,
        "targets": {
            f"key_over_off_{n}": {
                "ratio": one["key"],
                "target": f">= {LEAST:g}",
                "met": one["key"] >= LEAST,
            }
            for n, one in over_off.items()
        },
    }


async def conversations(rollouts: Rollouts, repeat: int, turns: int, new: int) -> Line:
    """Time conversations of many turns, one at a time, in all modes."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(repeat + 1):
        for mode in MODES if number % 2 else reversed(MODES):
            took = await rollouts.converse(mode, number, turns, new, TURN)
            if number:
                found[mode].append(took * 1e3)
    times = {mode: Times(rounds) for mode, rounds in found.items()}
    target = Target("key_over_off", "key", "off", most=1.05)
    return {
        "part": "conversations",
        "turns": turns,
        "new_tokens": new,
        "ms": {mode: one.summary() for mode, one in times.items()},
        "targets": {target.name: target.judge(times)},
    }


async def tensors(rollouts: Rollouts, count: int, repeat: int, new: int) -> Line:
    """Time keys to a tensor on the GPU, beside copying as many bytes there from pinned memory."""
    rng = random.Random(0)
    results = await asyncio.gather(
        *(rollouts.sample("key", a_prompt(rng, PROMPT), new) for _ in range(count))
    )
    sequences = [RoutedSequence(str(r.routed_experts), length=r.num_routed_tokens) for r in results]
    client = RoutedExpertsClient("key")
    first = await asyncio.to_thread(client.materialize, sequences, where="local")
    pinned = torch.empty_like(first.ids, pin_memory=True)
    device = torch.empty_like(first.ids, device="cuda")
    times: dict[str, list[float]] = {"keys_to_gpu": [], "copy_to_gpu": []}
    for _ in range(repeat + 1):
        for name, found in times.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            if name == "keys_to_gpu":
                await asyncio.to_thread(client.materialize, sequences, where="local", out=pinned)
            device.copy_(pinned, non_blocking=True)
            torch.cuda.synchronize()
            found.append((time.perf_counter() - begun) * 1e3)
    assert torch.equal(device.cpu(), first.ids)
    await rollouts.release("key", results)
    return {
        "part": "tensors",
        "shape": list(first.ids.shape),
        "bytes": first.ids.numel() * first.ids.element_size(),
        "ms": {name: Times(found[1:]).summary() for name, found in times.items()},
    }


def measure(model: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Yield the lines; engines alone have the GPU before the graph is served."""
    parts = options.parts.split(",")
    counts = [int(count) for count in options.concurrent.split(",")]
    turns, repeat, new = (4, 1, options.new) if options.quick else (20, options.repeat, options.new)
    if "profile" in parts:
        yield profiled(model, counts[0], repeat, new)
    if {"together", "steady", "conversations", "tensors"}.isdisjoint(parts):
        return
    serve.start(proxy_location="Disabled")
    share, kwargs = (0.3, GRAPH) if torch.cuda.is_available() else (0, ON_CPU)
    serve.run_many([application(name, model, max(counts), share, kwargs) for name in APPLICATIONS])
    rollouts = Rollouts(timeout_s=300)
    if "together" in parts:
        yield asyncio.run(throughput(rollouts, counts, repeat, new, steady=False))
    if "steady" in parts:
        yield asyncio.run(throughput(rollouts, counts, repeat, new, steady=True))
    if "conversations" in parts:
        yield asyncio.run(conversations(rollouts, repeat, turns, 16))
    if "tensors" in parts and torch.cuda.is_available():
        yield asyncio.run(tensors(rollouts, max(counts), 5, new))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time LMDeploy on a GPU, engine and graph.")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--concurrent", help="rollouts at once; default 64,128,256; quick 8")
    parser.add_argument("--new", type=int, help="tokens a rollout; default 512, quick 32")
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a small model: does it run?")
    options = parser.parse_args()
    options.concurrent = options.concurrent or ("8" if options.quick else "64,128,256")
    options.new = options.new or (32 if options.quick else 512)
    cuda = torch.cuda.is_available()
    shape, store = (QUICK, 1 << 30) if options.quick else (REAL, 8 << 30)
    with tempfile.TemporaryDirectory() as path, own_ray(object_store_bytes=store):
        model = write_checkpoint(Path(path), vocab=VOCABULARY, context=8192, **shape)
        about: Line = {"benchmark": "gpu", "model": shape, "repeat": options.repeat}
        about |= {"machine": describe(), "versions": versions()}
        about["gpu"] = torch.cuda.get_device_name() if cuda else None
        for line in measure(model, options):
            emit(about | line)


if __name__ == "__main__":
    main()
