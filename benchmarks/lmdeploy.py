"""LMDeploy as the engine: what keys cost a conversation, and a finished rollout the event loop.

    python -m benchmarks.engine --backend lmdeploy [--quick] [--repeat N]

Without CUDA the real engine runs on the CPU operators of tests/lmdeploy. ``off`` is an engine that
records nothing; ``key`` one whose replica puts each rollout's routes; both have a prefix cache and
hold the same conversation, turn by turn. The lag is that of a task that wants to wake every
millisecond, its longest from LMDeploy's last output with 12 MB of rows to the key: ``key`` is what
a replica does then, ``theirs`` LMDeploy's own blocking put into its own actor, ``idle`` nothing.
The model's steps would hide it: on a CPU they run on that loop too.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Iterator
from math import prod
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import ray

from benchmarks.harness.cluster import start
from benchmarks.harness.engine_host import STORE, TALKS, EngineHost, StoreIsUp, conversations
from benchmarks.harness.lmdeploy_engine import without_cuda
from benchmarks.harness.measuring import Times
from benchmarks.harness.routes import random_routes
from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.deployments.sampling.own_engine import OwnEngine
from serve_app.engines.base import ModelInfo
from serve_app.engines.lmdeploy.rollout import Rollout
from serve_app.engines.stream import ChunkStream
from serve_app.types import GenerateRequest

TALKING: dict[str, Any] = {"hidden": 128, "layers": 4, "experts": 16, "top_k": 4}
ROWS = (16_384, 48, 8)  # 2 bytes an id for more than 256 experts: 12 MiB
EXPERTS = 512
TICK_S = 0.001  # a loop of libuv counts whole milliseconds
IDLE_S = 0.03
WAYS = ("idle", "key", "theirs")


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
    """An actor with a real engine that is given LMDeploy's last outputs, and finishes rollouts."""

    def __init__(self, args: EngineArgs, store: StoreArgs) -> None:
        without_cuda()
        from lmdeploy.pytorch.engine import engine_instance

        from serve_app.engines.lmdeploy.slots import Limits, Slots

        up: Any = StoreIsUp()
        replica = InferenceEngine(args, store, up)
        engine: Any = cast(OwnEngine, replica._rollouts).engine
        rows, layers, top_k = ROWS
        self._info = ModelInfo("wide", layers, tuple(range(layers)), EXPERTS, top_k, 512, 1 << 20)
        self._slots = Slots(
            engine._backend, Limits(1, 1), self._info, engine._taken, engine._threads
        )
        self._keys = replica._keys
        engine_instance._lazy_create_ray_store()
        self._instance = engine._backend.engine.create_instance()
        self._instance._enable_transfer_obj_ref = True
        self._tokens = [index % 500 for index in range(rows)]
        self._rows = random_routes(ROWS, EXPERTS)

    async def ready(self) -> None:
        """Answer once the engine is there."""

    async def lag(self, way: str, number: int) -> float:
        """Finish one rollout; return the loop's longest lag in it, in ms."""
        lags: list[float] = []
        ticking = asyncio.create_task(_tick(lags))
        await asyncio.sleep(5 * TICK_S)
        lags.clear()
        clean_up: Awaitable[object] = await getattr(self, f"_{way}")(number)
        await asyncio.sleep(5 * TICK_S)
        ticking.cancel()
        await clean_up
        return 1e3 * max(lags)

    async def _idle(self, number: int) -> Awaitable[object]:
        await asyncio.sleep(IDLE_S)
        return asyncio.sleep(0)

    async def _key(self, number: int) -> Awaitable[object]:
        request = GenerateRequest(
            request_id=str(number), input_ids=self._tokens, return_routed_experts=True
        )
        stream = ChunkStream(asyncio.Event())
        rollout = Rollout(request, stream, stop_ids=(), max_new_tokens=1, decode=None)
        self._slots._live[request.request_id] = rollout
        rollout.take([7], [-1.0])
        await self._slots._finish(rollout, self._rows)
        chunk = stream.take()
        assert chunk is not None
        assert chunk.record is not None
        assert chunk.record.meta.ids_nbytes == 12 << 20
        key = await self._keys.put(request, chunk.record, None)
        return self._keys.release([key])

    async def _theirs(self, number: int) -> Awaitable[object]:
        from lmdeploy.messages import ResponseType

        output = SimpleNamespace(type=ResponseType.FINISH, data={"routed_experts": self._rows})
        found = self._instance._get_extra_outputs(output, ROWS[0] + 1)
        actor = ray.get_actor("shared_store", namespace="lmdeploy")
        read: Awaitable[object] = actor.get.remote(found["routed_experts"])  # which frees it
        return read


async def _tick(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + TICK_S  # the loop's own clock counts whole milliseconds
        await asyncio.sleep(TICK_S)
        lags.append(time.perf_counter() - due)


def measure_lmdeploy(path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of `python -m benchmarks.engine --backend lmdeploy`."""
    talking = arguments(write_checkpoint(path / "talking", **TALKING))
    host = start(TalkingHost, talking, STORE)
    for kind, (said, new) in TALKS.items():
        talk = conversations(host, options.repeat, 4 if options.quick else 20, said, new)
        yield {
            "part": "conversations",
            "model": TALKING,
            "turns_of": {"kind": kind, "prompt": said, "reply": new},
            "ms": {mode: round(ms, 1) for mode, ms in talk.items()},
            "targets": {"conversation_key_off": judged(talk["key"] / talk["off"], 1.05)},
        }
    ray.kill(host)
    host = start(FinishingHost, talking, STORE)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(2 + (5 if options.quick else 5 * options.repeat)):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            lag = ray.get(host.lag.remote(way, number))
            if number >= 2:  # the first ones meet cold connections
                found[way].append(lag)
    ray.kill(host)
    base = median(found["idle"])
    added = {way: [max(0.0, lag - base) for lag in found[way]] for way in ("key", "theirs")}
    ours, theirs = median(added["key"]), median(added["theirs"])
    yield {
        "part": "lag",
        "rows": list(ROWS),
        "bytes": 2 * prod(ROWS),
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
