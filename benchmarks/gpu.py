"""LMDeploy on a GPU behind the whole graph: what recording and keys cost, and what a key gives.

    python -m benchmarks.gpu [--quick] [--repeat N] [--concurrent 64,128,256]

Three applications share one GPU and take turns, so that each round finds the same machine:
``off`` records nothing, ``inline`` answers with the array, ``key`` puts it into a shard. The
model has Qwen3-30B-A3B's routing (48 layers, 128 experts, 8 a token), random weights, and is
narrow: its steps are short, so what recording adds weighs more than in the real one. Prints one
JSON line a part.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ray import serve

from benchmarks.harness.cluster import own_ray
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Target, Times
from examples.tiny_moe import write_checkpoint
from graphs.rollout import build
from serve_app.client import AsyncRoutedExpertsClient, RoutedExpertsClient
from serve_app.config import RolloutArgs
from serve_app.types import GenerateRequest, GenerateResult, RoutedSequence

MODES = {"off": (False, False), "inline": (True, False), "key": (True, True)}
REAL: dict[str, Any] = {"hidden": 256, "layers": 48, "experts": 128, "top_k": 8}
QUICK: dict[str, Any] = {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4}
PROMPT, TURN, VOCABULARY = 256, 64, 512
Line = dict[str, Any]


def application(mode: str, model: Path, most: int) -> serve.RunTarget:
    """Compose one application that takes a share of the GPU."""
    records, by_key = MODES[mode]
    args = {
        "engine": {
            "backend": "lmdeploy",
            "model": str(model),
            "dtype": "bfloat16",
            "max_batch_size": most,
            "enable_return_routed_experts": records,
            "enable_transfer_obj_ref": by_key,
            "engine_kwargs": {"cache_max_entry_count": 0.2, "enable_prefix_caching": True},
            "serve": {"num_gpus": 0.3, "num_cpus": 1, "max_ongoing_requests": 2 * most},
        },
        "decoder": {"serve": {"num_cpus": 0.5}},
    }
    return serve.RunTarget(build(RolloutArgs.model_validate(args)), name=mode, route_prefix=None)


class Rollouts:
    """Samples in the three applications; every mode gets the same prompts."""

    def __init__(self, timeout_s: float) -> None:
        self._clients = {
            mode: AsyncRoutedExpertsClient(mode, generate_timeout_s=timeout_s) for mode in MODES
        }

    async def together(self, mode: str, prompts: Sequence[list[int]], new: int) -> float:
        """Return the tokens a second of so many rollouts at once, routes handed over."""
        begun = time.perf_counter()
        results = await asyncio.gather(*(self.sample(mode, prompt, new) for prompt in prompts))
        took = time.perf_counter() - begun
        await self.release(mode, results)
        return len(prompts) * new / took

    async def converse(self, mode: str, seed: int, turns: int, new: int) -> float:
        """Return the seconds of one conversation."""
        rng = random.Random(seed)
        tokens, results = a_prompt(rng, PROMPT), list[GenerateResult]()
        begun = time.perf_counter()
        for _ in range(turns):
            key = results[-1].routed_experts if results and mode == "key" else None
            assert key is None or isinstance(key, str)
            results.append(await self.sample(mode, tokens, new, key))
            tokens = [*tokens, *results[-1].output_ids, *a_prompt(rng, TURN)]
        took = time.perf_counter() - begun
        await self.release(mode, results)
        return took

    async def sample(
        self, mode: str, prompt: list[int], new: int, key: str | None = None
    ) -> GenerateResult:
        request = GenerateRequest(
            input_ids=prompt,
            max_new_tokens=new,
            temperature=1.0,
            ignore_eos=True,
            return_routed_experts=mode != "off",
            continue_from=key,
        )
        result = await self._clients[mode].generate(request)
        assert len(result.output_ids) == new, result.error
        assert (result.routed_experts is None) == (mode == "off"), result.routed_experts_error
        return result

    async def release(self, mode: str, results: Sequence[GenerateResult]) -> None:
        keys = [r.routed_experts for r in results if isinstance(r.routed_experts, str)]
        if keys:
            await self._clients[mode].release(keys)


def a_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 256) for _ in range(length)]


async def throughput(rollouts: Rollouts, counts: Sequence[int], repeat: int, new: int) -> Line:
    """Return tokens a second by concurrency and mode, medians of interleaved rounds."""
    found: dict[tuple[int, str], list[float]] = {(n, mode): [] for n in counts for mode in MODES}
    for number in range(repeat + 1):
        modes = list(MODES)[number % 3 :] + list(MODES)[: number % 3]
        for count in counts:
            rng = random.Random(number * 1000 + count)
            prompts = [a_prompt(rng, PROMPT) for _ in range(count)]
            for mode in modes:
                speed = await rollouts.together(mode, prompts, new)
                if number:  # the first round compiles and warms up
                    found[count, mode].append(speed)
    speeds = {n: {mode: round(median(found[n, mode]), 1) for mode in MODES} for n in counts}
    return {
        "part": "throughput",
        "prompt": PROMPT,
        "new_tokens": new,
        "tokens_per_s": {str(n): by_mode for n, by_mode in speeds.items()},
        "key_over_off": {str(n): round(s["key"] / s["off"], 3) for n, s in speeds.items()},
        "inline_over_off": {str(n): round(s["inline"] / s["off"], 3) for n, s in speeds.items()},
    }


async def conversations(rollouts: Rollouts, repeat: int, turns: int, new: int) -> Line:
    """Time conversations of many turns, one at a time, in all modes."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(repeat + 1):
        for mode in MODES if number % 2 else reversed(MODES):
            took = await rollouts.converse(mode, number, turns, new)
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


async def measure(options: argparse.Namespace) -> None:
    rollouts = Rollouts(timeout_s=300)
    counts = [int(count) for count in options.concurrent.split(",")]
    turns, repeat = (4, 1) if options.quick else (20, options.repeat)
    for line in (
        throughput(rollouts, counts, repeat, options.new),
        conversations(rollouts, repeat, turns, 16),
        tensors(rollouts, max(counts), 5, options.new),
    ):
        about: Line = {"benchmark": "gpu", "model": QUICK if options.quick else REAL}
        about |= {"repeat": repeat, "machine": describe(), "versions": versions()}
        emit(about | {"gpu": torch.cuda.get_device_name()} | await line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time LMDeploy on a GPU behind the graph.")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--concurrent", help="rollouts at once; default 64,128,256; quick 8")
    parser.add_argument("--new", type=int, help="tokens a rollout; default 512, quick 32")
    parser.add_argument("--quick", action="store_true", help="a small model: does it run?")
    options = parser.parse_args()
    options.concurrent = options.concurrent or ("8" if options.quick else "64,128,256")
    options.new = options.new or (32 if options.quick else 512)
    most = max(int(count) for count in options.concurrent.split(","))
    with tempfile.TemporaryDirectory() as path, own_ray(object_store_bytes=8 << 30):
        shape = QUICK if options.quick else REAL
        model = write_checkpoint(Path(path), vocab=VOCABULARY, context=8192, **shape)
        serve.start(proxy_location="Disabled")
        serve.run_many([application(mode, model, most) for mode in MODES])
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
