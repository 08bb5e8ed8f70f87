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
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.harness.cluster import own_ray, start
from benchmarks.harness.engine_host import PROMPT, STORE, TALKS, EngineHost, conversations
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.measuring import Target, Times
from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs
from serve_app.deployments.context import LOCAL_APP
from serve_app.engines.transformers.checkpoint import load_checkpoint
from serve_app.engines.transformers.expert_rows import PENDING, ExpertRows
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.engines.transformers.runner import ModelRunner, Prompt
from serve_app.store.owner.directory import open_directory

MODES = ("off", "inline", "key")
MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4},
    "large": {"hidden": 512, "layers": 8, "experts": 64, "top_k": 8},
}
SCALING = {"small": 4.0, "large": 2.0}
HELD = {"small": ("chat", "short"), "large": ("short",)}
CONCURRENT = 16


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
