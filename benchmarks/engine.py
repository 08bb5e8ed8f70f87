"""The Transformers engine: tokens a second by concurrency and by what becomes of the routes.

    python -m benchmarks.engine [--quick] [--repeat N] [--models small,large] [--threads N]

Prints one JSON line a model and part. ``off`` records nothing, ``inline`` answers with the array,
``key`` puts it into a shard. Rounds are interleaved and medians compared. Recording itself is
timed step by step, on and off in turn on one running batch, as the thread's CPU time: whole rounds
wander too much to see it. Conversations of 20 turns are held in both ways at once, turn by turn,
on the same tokens.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.cluster import own_ray, start
from benchmarks.machine import describe, versions
from benchmarks.measuring import Target, Times
from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import LOCAL_APP
from serve_app.deployments.engine import InferenceEngine
from serve_app.engines.checkpoint import load_checkpoint
from serve_app.engines.recording import ExpertRecorder
from serve_app.engines.runner import ModelRunner, Prompt
from serve_app.store.base import RecordStore
from serve_app.store.client import connect
from serve_app.store.directory import open_directory
from serve_app.types import GenerateRequest, GenerateResult

MODES = ("off", "inline", "key")
MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4},
    "large": {"hidden": 512, "layers": 8, "experts": 64, "top_k": 8},
}
SCALING = {"small": 4.0, "large": 2.0}
STORE = StoreArgs(leave_after_s=3600)
PROMPT = list(range(3, 19))
TURN = list(range(20, 28))


class StoreIsUp:
    """Stands for the store deployment, which a replica waits for; here its directory is open."""

    @property
    def ready(self) -> "StoreIsUp":
        return self

    async def remote(self) -> None:
        return None


class EngineHost:
    """An actor with what an engine replica runs, once with keys and once with arrays."""

    def __init__(self, args: EngineArgs, store: StoreArgs) -> None:
        arrays = args.model_copy(update={"enable_transfer_obj_ref": False})
        up: Any = StoreIsUp()
        by_key, inline = (InferenceEngine(one, store, up) for one in (args, arrays))
        self._engines = {"off": by_key, "inline": inline, "key": by_key}
        self._store: RecordStore | None = None

    async def run(self, mode: str, concurrent: int, new: int) -> float:
        """Return the seconds that so many rollouts at once take, routes handed over."""
        begun = time.perf_counter()
        results = await asyncio.gather(
            *(self._sample(PROMPT, mode, new) for _ in range(concurrent))
        )
        took = time.perf_counter() - begun
        await self._release(results)
        return took

    async def converse(self, turns: int, new: int) -> dict[str, float]:
        """Hold one conversation off and by key, turn by turn; return the seconds of each."""
        seconds = {"off": 0.0, "key": 0.0}
        tokens, results = list(PROMPT), list[GenerateResult]()
        for turn in range(turns):
            key = results[-1].routed_experts if results else None
            assert key is None or isinstance(key, str)
            for mode in ("off", "key") if turn % 2 else ("key", "off"):
                begun = time.perf_counter()
                result = await self._sample(tokens, mode, new, key if mode == "key" else None)
                seconds[mode] += time.perf_counter() - begun
                if mode == "key":
                    results.append(result)
            tokens = [*tokens, *results[-1].output_ids, *TURN]
        await self._release(results)
        return seconds

    async def _sample(
        self, prompt: list[int], mode: str, new: int, key: str | None = None
    ) -> GenerateResult:
        request = GenerateRequest(
            input_ids=prompt,
            max_new_tokens=new,
            temperature=0.0,
            ignore_eos=True,
            return_routed_experts=mode != "off",
            continue_from=key,
        )
        result = await self._engines[mode].generate(request)
        assert (result.routed_experts is None) == (mode == "off"), result.routed_experts_error
        return result

    async def _release(self, results: Sequence[GenerateResult]) -> None:
        keys = [r.routed_experts for r in results if isinstance(r.routed_experts, str)]
        if keys:
            if self._store is None:
                self._store = await asyncio.to_thread(connect, LOCAL_APP)
            await asyncio.to_thread(self._store.release, keys)


def throughput(
    host: Any, concurrencies: Sequence[int], repeat: int, new: int
) -> dict[str, dict[str, float]]:
    """Return tokens a second ``[concurrency][mode]``, medians of interleaved rounds."""
    found: dict[tuple[int, str], list[float]] = {
        (count, mode): [] for count in concurrencies for mode in MODES
    }
    for count, mode in found:
        ray.get(host.run.remote(mode, count, 2))
    for number in range(repeat):
        order = list(found)
        for count, mode in [*order[number % len(order) :], *order[: number % len(order)]]:
            found[count, mode].append(count * new / ray.get(host.run.remote(mode, count, new)))
    return {
        str(count): {mode: round(median(found[count, mode]), 1) for mode in MODES}
        for count in concurrencies
    }


def recording_cost(args: EngineArgs, rows: int, steps: int) -> dict[str, Times]:
    """Return the CPU time of one batch's decode steps, recording in every second one."""
    import torch

    checkpoint = load_checkpoint(args)
    torch.set_num_threads(checkpoint.options.num_threads)
    runner = ModelRunner(checkpoint.model, ExpertRecorder(checkpoint.blocks))
    for row in range(rows):
        prompt = Prompt([3 + row, *PROMPT])
        runner.process(prompt, len(prompt.tokens), record=True)
        runner.join(prompt)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(steps):
        for record in (True, False) if step % 2 else (False, True):
            begun = time.thread_time()
            runner.decode([5] * rows, record=record)
            times[record].append((time.thread_time() - begun) * 1e3)
    return {"step_off": Times(times[False]), "step_recording": Times(times[True])}


def conversations(host: Any, repeat: int, turns: int, new: int) -> dict[str, Times]:
    ray.get(host.converse.remote(2, new))
    rounds = [ray.get(host.converse.remote(turns, new)) for _ in range(repeat)]
    return {mode: Times([one[mode] * 1e3 for one in rounds]) for mode in ("off", "key")}


@contextmanager
def hosted(args: EngineArgs) -> Iterator[Any]:
    host = start(EngineHost, args, STORE)
    yield host
    ray.kill(host)


def measure(name: str, path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of one model."""
    args = EngineArgs(
        model=str(write_checkpoint(path / name, **MODELS[name])),
        dtype="float32",
        enable_return_routed_experts=True,
        enable_transfer_obj_ref=True,
        max_batch_size=64,
        engine_kwargs={"num_threads": options.threads} if options.threads else {},
    )
    steps = 20 if options.quick else 200 if name == "small" else 40
    times = recording_cost(args, rows=16, steps=steps)
    target = Target("recording_steps", "step_recording", "step_off", most=1.05)
    yield {
        "part": "recording",
        "cpu_ms": {key: found.summary() for key, found in times.items()},
        "targets": {target.name: target.judge(times)},
    }
    with hosted(args) as host:
        counts = (1, 16) if options.quick else (1, 4, 16, 64) if name == "small" else (1, 4, 16)
        speeds = throughput(host, counts, options.repeat, options.new)
        ratio, least = speeds["16"]["key"] / speeds["1"]["key"], SCALING[name]
        cost = speeds["16"]["off"] / speeds["16"]["key"]
        yield {
            "part": "throughput",
            "tokens_per_s": speeds,
            "targets": {
                "16_over_1": {
                    "ratio": round(ratio, 2),
                    "target": f">= {least:g}",
                    "met": ratio >= least,
                },
                "off_over_key_at_16": {
                    "ratio": round(cost, 3),
                    "target": "<= 1.05",
                    "met": cost <= 1.05,
                },
            },
        }
        talks = conversations(host, options.repeat, 4 if options.quick else 20, 16)
        target = Target("conversation_on_off", "key", "off", most=1.05)
        yield {
            "part": "conversations",
            "ms": {mode: found.summary() for mode, found in talks.items()},
            "targets": {target.name: target.judge(talks)},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the Transformers engine.")
    parser.add_argument("--backend", choices=["transformers", "lmdeploy"], default="transformers")
    parser.add_argument("--models", default="small,large", help="some of small, large")
    parser.add_argument("--repeat", type=int, help="rounds; default 7, quick 2")
    parser.add_argument("--new", type=int, default=32, help="tokens a rollout")
    parser.add_argument("--threads", type=int, help="of the engine; default: the engine's own")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    options = parser.parse_args()
    options.repeat = options.repeat or (2 if options.quick else 7)
    with tempfile.TemporaryDirectory() as path, own_ray(object_store_bytes=1 << 30):
        open_directory(LOCAL_APP, STORE, STORE.call_timeout_s)
        if options.backend == "lmdeploy":
            from benchmarks.lmdeploy import measure_lmdeploy

            for line in measure_lmdeploy(Path(path), options):
                about = {"benchmark": "engine", "backend": "lmdeploy", **line}
                about |= {"repeat": options.repeat, "machine": describe(), "versions": versions()}
                print(json.dumps(about), flush=True)
            return
        for name in options.models.split(","):
            for line in measure(name, Path(path), options):
                about = {"benchmark": "engine", "model": name, **MODELS[name], **line}
                about |= {"repeat": options.repeat, "machine": describe(), "versions": versions()}
                print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
