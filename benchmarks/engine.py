"""The Transformers engine: tokens a second by concurrency and by what becomes of the routes.

    python -m benchmarks.engine [--quick] [--repeat N] [--models small,large] [--backend lmdeploy]

Prints one JSON line a model and part. ``off`` records nothing, ``inline`` answers with the array,
``key`` puts it into a shard. Rounds are interleaved and medians compared. Whole rounds wander by
more than recording costs, so that is timed as CPU time: of the step thread, step by step, on and
off in turn on one running batch; and of engine and shard together, round by round.

Conversations of 20 turns are held in both ways at once, turn by turn, on the same tokens. In a
``chat`` each side says a third of what it does in LMSYS-Chat-1M on average (70 tokens a prompt, 215
a reply); in ``short`` turns of 8 and 16 tokens a call to the shard weighs most. The whole prompt is
processed in every turn.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.cluster import own_ray, start
from benchmarks.lines import emit
from benchmarks.machine import describe, versions
from benchmarks.measuring import Target, Times
from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import LOCAL_APP
from serve_app.deployments.engine import InferenceEngine
from serve_app.engines.checkpoint import load_checkpoint
from serve_app.engines.expert_rows import PENDING, ExpertRows
from serve_app.engines.recording import ExpertRecorder
from serve_app.engines.runner import ModelRunner, Prompt
from serve_app.store.base import RecordStore
from serve_app.store.client import connect
from serve_app.store.directory import find_shard, open_directory, this_node
from serve_app.types import GenerateRequest, GenerateResult

MODES = ("off", "inline", "key")
MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4},
    "large": {"hidden": 512, "layers": 8, "experts": 64, "top_k": 8},
}
SCALING = {"small": 4.0, "large": 2.0}
STORE = StoreArgs(leave_after_s=3600)
PROMPT = list(range(3, 19))
TALKS = {"chat": (24, 72), "short": (8, 16)}  # tokens of a prompt and of a reply
HELD = {"small": ("chat", "short"), "large": ("short",)}
CONCURRENT = 16


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

    async def run(self, mode: str, concurrent: int, new: int) -> tuple[float, float]:
        """Return the seconds that so many rollouts at once take, routes handed over.

        And the CPU seconds of this process and of its shard.
        """
        spent, begun = await self._cpu_s(), time.perf_counter()
        results = await asyncio.gather(
            *(self._sample(PROMPT, mode, new) for _ in range(concurrent))
        )
        took, spent = time.perf_counter() - begun, await self._cpu_s() - spent
        await self._release(results)
        return took, spent

    async def _cpu_s(self) -> float:
        mine, shard = time.process_time(), find_shard(LOCAL_APP, this_node())
        if shard is None:
            return mine
        theirs: float = await shard.__ray_call__.remote(lambda _: time.process_time())
        return mine + theirs

    async def converse(self, turns: int, said: int, new: int) -> dict[str, list[float]]:
        """Hold one conversation off and by key, turn by turn; return the seconds of each turn."""
        seconds: dict[str, list[float]] = {"off": [], "key": []}
        tokens, results = list(PROMPT), list[GenerateResult]()
        for turn in range(turns):
            key = results[-1].routed_experts if results else None
            assert key is None or isinstance(key, str)
            for mode in ("off", "key") if turn % 2 else ("key", "off"):
                begun = time.perf_counter()
                result = await self._sample(tokens, mode, new, key if mode == "key" else None)
                seconds[mode].append(time.perf_counter() - begun)
                if mode == "key":
                    results.append(result)
            tokens = [*tokens, *results[-1].output_ids, *range(20, 20 + said)]
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
            took, _ = ray.get(host.run.remote(mode, count, new))
            found[count, mode].append(count * new / took)
    return {
        str(count): {mode: round(median(found[count, mode]), 1) for mode in MODES}
        for count in concurrencies
    }


def by_key_cost(host: Any, repeat: int, new: int) -> dict[str, Times]:
    """Return the CPU time of engine and shard for rounds without and with keys, in turn."""
    found: dict[str, list[float]] = {"off": [], "key": []}
    for number in range(2 * repeat):
        for mode in ("off", "key") if number % 2 else ("key", "off"):
            _, spent = ray.get(host.run.remote(mode, CONCURRENT, new))
            found[mode].append(spent * 1e3)
    return {f"cpu_{mode}": Times(spent) for mode, spent in found.items()}


def recording_cost(args: EngineArgs, rows: int, steps: int) -> dict[str, Times]:
    """Return the CPU time of one batch's decode steps, recording in every second one.

    What has to be done once for many steps is shared out among them.
    """
    import torch

    checkpoint = load_checkpoint(args)
    torch.set_num_threads(checkpoint.options.num_threads)
    runner = ModelRunner(checkpoint.model, ExpertRecorder(checkpoint.blocks))
    for row in range(rows):
        prompt = Prompt([3 + row, *PROMPT])
        runner.process(prompt, len(prompt.tokens), record=True)
        runner.join(prompt)
    info, times = checkpoint.info, dict[bool, list[float]]({False: [], True: []})
    for _ in range(0, steps, PENDING):
        kept = [
            ExpertRows(
                layers=info.layers,
                moe_layers=info.moe_layers,
                top_k=info.top_k,
                num_experts=info.num_experts,
                capacity=PENDING,
            )
            for _ in range(rows)
        ]
        recorded: list[float] = []
        for step in range(1, PENDING):
            for record in (True, False) if step % 2 else (False, True):
                begun = time.thread_time()
                _, captured = runner.decode([5] * rows, record=record)
                if captured is not None:
                    for row, one in enumerate(kept):
                        one.append(captured, slice(row, row + 1), 1)
                (recorded if record else times[False]).append((time.thread_time() - begun) * 1e3)
        begun = time.thread_time()
        for one in kept:
            one.first(one.rows)
        shared = (time.thread_time() - begun) * 1e3 / len(recorded)
        times[True] += [took + shared for took in recorded]
    return {"step_off": Times(times[False]), "step_recording": Times(times[True])}


def conversations(host: Any, repeat: int, turns: int, said: int, new: int) -> dict[str, float]:
    """Return the milliseconds of a conversation: each turn's median over the rounds, added up."""
    ray.get(host.converse.remote(2, said, new))
    rounds = [ray.get(host.converse.remote(turns, said, new)) for _ in range(repeat)]
    return {
        mode: sum(1e3 * median(turn) for turn in zip(*(one[mode] for one in rounds), strict=True))
        for mode in ("off", "key")
    }


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
    steps = PENDING if options.quick or name == "large" else 4 * PENDING
    times = recording_cost(args, rows=CONCURRENT, steps=steps)
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
        yield {
            "part": "throughput",
            "tokens_per_s": speeds,
            "targets": {
                "16_over_1": {
                    "ratio": round(ratio, 2),
                    "target": f">= {least:g}",
                    "met": ratio >= least,
                },
            },
        }
        cpu = by_key_cost(host, options.repeat, options.new)
        target = Target("by_key_cpu_at_16", "cpu_key", "cpu_off", most=1.05)
        yield {
            "part": "by_key",
            "cpu_ms": {key: found.summary() for key, found in cpu.items()},
            "targets": {target.name: target.judge(cpu)},
        }
        for kind in HELD[name]:
            said, new = TALKS[kind]
            rounds = options.repeat if name == "small" else min(options.repeat, 3)
            talk = conversations(host, rounds, 4 if options.quick else 20, said, new)
            ratio = talk["key"] / talk["off"]
            yield {
                "part": "conversations",
                "turns_of": {"kind": kind, "prompt": said, "reply": new},
                "ms": {mode: round(ms, 1) for mode, ms in talk.items()},
                "targets": {
                    "conversation_on_off": {
                        "ratio": round(ratio, 3),
                        "target": "<= 1.05",
                        "met": ratio <= 1.05,
                    }
                },
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
                emit(about)
            return
        for name in options.models.split(","):
            for line in measure(name, Path(path), options):
                about = {"benchmark": "engine", "model": name, **MODELS[name], **line}
                about |= {"repeat": options.repeat, "machine": describe(), "versions": versions()}
                emit(about)


if __name__ == "__main__":
    main()
