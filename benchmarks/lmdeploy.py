"""LMDeploy as the engine: what keys cost a conversation, and a finished rollout the event loop.

    python -m benchmarks.engine --backend lmdeploy [--quick] [--repeat N]

Without CUDA the real engine runs on the CPU operators of tests/lmdeploy. ``off`` is an engine that
records nothing; ``key`` one whose replica puts each rollout's routes; both have a prefix cache and
hold the same conversation, turn by turn. The lag is that of a task that wants to wake every half a
millisecond, its longest during one rollout of 12 MB; the prompt comes from the prefix cache whole,
so little else happens. ``array`` makes the record and puts nothing; ``theirs`` is LMDeploy's own
blocking put into its own actor. What a put adds is the lag over that of ``array``.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import ray

from benchmarks.cluster import start
from benchmarks.engine import STORE, TALKS, EngineHost, StoreIsUp, conversations
from benchmarks.measuring import Times
from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.engine import InferenceEngine
from serve_app.engines.base import Engine
from serve_app.engines.loading import load_engine
from serve_app.records import Ids
from serve_app.types import GenerateRequest

TALKING: dict[str, Any] = {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4}
WIDE: dict[str, Any] = {"hidden": 16, "layers": 8, "experts": 512, "top_k": 256, "context": 4096}
ROWS = 3072  # of 8 layers, 256 experts each, 2 bytes an id: 12 MiB
TICK_S = 0.0005
STORMY: dict[str, Any] = {
    "backend": "lmdeploy",
    "dtype": "float16",  # float32 where the CPU's operators are used
    "engine_kwargs": {
        "eager_mode": True,
        "num_gpu_blocks": 300,  # few enough that rollouts lose theirs now and then
        "block_size": 16,
        "max_prefill_token_num": 256,
        "enable_prefix_caching": True,
    },
}
WAYS = ("array", "key", "theirs")


def arguments(path: Path, **fields: Any) -> EngineArgs:
    """Return the arguments of an engine with a prefix cache."""
    kwargs = {"eager_mode": True, "num_gpu_blocks": 1000, "block_size": 16}
    return EngineArgs(
        backend="lmdeploy",
        model=str(path),
        enable_return_routed_experts=True,
        enable_transfer_obj_ref=True,
        max_batch_size=16,
        engine_kwargs={
            **kwargs,
            "max_prefill_token_num": 1024,
            "enable_prefix_caching": True,
            **fields,
        },
    )


def without_cuda() -> None:
    """Run the real engine on this CPU, if that is all there is."""
    import torch

    if not torch.cuda.is_available():
        os.environ["LMDEPLOY_SKIP_WARMUP"] = "1"
        torch.set_num_threads(1)
        from tests.lmdeploy.cpu_backend import install

        install()


class TalkingHost(EngineHost):
    """An actor with one replica that puts routes, and one that records none."""

    def __init__(self, args: EngineArgs, store: StoreArgs) -> None:
        without_cuda()
        off = {"enable_return_routed_experts": False, "enable_transfer_obj_ref": False}
        up: Any = StoreIsUp()
        self._engines = {
            "off": InferenceEngine(args.model_copy(update=off), store, up),
            "key": InferenceEngine(args, store, up),
        }
        self._store = None


class FinishingHost:
    """An actor whose rollouts end with 12 MB of routes, in three ways."""

    def __init__(self, args: EngineArgs, store: StoreArgs) -> None:
        without_cuda()
        arrays = args.model_copy(update={"enable_transfer_obj_ref": False})
        up: Any = StoreIsUp()
        self._replicas = {
            "array": InferenceEngine(arrays, store, up),
            "key": InferenceEngine(args, store, up),
        }
        theirs = {**args.engine_kwargs, "transfer": "lmdeploy"}
        self._theirs: Engine = load_engine(
            args.model_copy(update={"engine_kwargs": theirs}), self._fetch
        )

    async def _fetch(self, key: str) -> Ids:
        actor = ray.get_actor("shared_store", namespace="lmdeploy")
        ids: Ids = await actor.get.remote(key)
        return ids

    async def lag(self, way: str, number: int) -> tuple[float, float]:
        """Sample one rollout; return the loop's longest lag in it, and the seconds it took."""
        request = GenerateRequest(
            request_id=f"{way}-{number}",
            input_ids=[(7 * index) % 250 + 3 for index in range(ROWS)],
            max_new_tokens=1,
            temperature=0,
            ignore_eos=True,
            return_routed_experts=True,
        )
        lags: list[float] = []
        ticking = asyncio.create_task(_tick(lags))
        await asyncio.sleep(5 * TICK_S)
        lags.clear()
        begun = time.perf_counter()
        if way == "theirs":
            chunks = [chunk async for chunk in self._theirs.generate(request)]
            assert chunks[-1].record is not None, chunks[-1].error
            assert chunks[-1].record.meta.nbytes >= 12 << 20
        else:
            result = await self._replicas[way].generate(request)
            assert result.routed_experts is not None, result.routed_experts_error
            assert result.num_routed_tokens == ROWS
        took = time.perf_counter() - begun
        await asyncio.sleep(5 * TICK_S)
        ticking.cancel()
        return 1e3 * max(lags), took


async def _tick(lags: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + TICK_S
        await asyncio.sleep(TICK_S)
        lags.append(loop.time() - due)


def measure_lmdeploy(path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of `python -m benchmarks.engine --backend lmdeploy`."""
    talking = arguments(write_checkpoint(path / "talking", **TALKING))
    host = start(TalkingHost, talking, STORE)
    said, new = TALKS["short"]
    talk = conversations(host, options.repeat, 4 if options.quick else 20, said, new)
    ratio = talk["key"] / talk["off"]
    yield {
        "part": "conversations",
        "model": TALKING,
        "turns_of": {"prompt": said, "reply": new},
        "ms": {mode: round(ms, 1) for mode, ms in talk.items()},
        "targets": {"conversation_key_off": judged(ratio, 1.05)},
    }
    ray.kill(host)
    host = start(FinishingHost, arguments(write_checkpoint(path / "wide", **WIDE)), STORE)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(2 + (5 if options.quick else 5 * options.repeat)):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            lag, _ = ray.get(host.lag.remote(way, number))
            if number >= 2:  # the first fill the prefix caches
                found[way].append(lag)
    ray.kill(host)
    base = median(found["array"])
    added = {way: [max(0.0, lag - base) for lag in found[way]] for way in ("key", "theirs")}
    ours, theirs = median(added["key"]), median(added["theirs"])
    yield {
        "part": "lag",
        "model": WIDE,
        "bytes": ROWS * 8 * 256 * 2,
        "longest_lag_ms": {way: Times(lags).summary() for way, lags in found.items()},
        "added_ms_p50": {"key": round(ours, 3), "theirs": round(theirs, 3)},
        "targets": {
            "added_by_a_finished_rollout_ms": judged(ours, 1.0),
            "theirs_over_ours": {
                "ratio": round(theirs / max(ours, 1e-3), 1),
                "target": ">= 10",
                "met": theirs >= 10 * ours,
            },
        },
    }


def judged(found: float, most: float) -> dict[str, Any]:
    """Return a figure and whether it keeps its bound."""
    return {"ratio": round(found, 3), "target": f"<= {most:g}", "met": found <= most}
