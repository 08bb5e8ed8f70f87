"""An actor with engines in it: rollouts at once, and conversations, with keys and without."""

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import ray

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import LOCAL_APP
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.store.access.client import connect
from serve_app.store.base import RecordStore
from serve_app.store.owner.directory import find_shard, this_node
from serve_app.types import GenerateRequest, GenerateResult

STORE = StoreArgs(leave_after_s=3600)
PROMPT = list(range(3, 19))
TALKS = {"chat": (24, 72), "short": (8, 16)}  # tokens of a prompt and of a reply


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


def conversations(host: Any, repeat: int, turns: int, said: int, new: int) -> dict[str, float]:
    """Return the milliseconds of a conversation: each turn's median over the rounds, added up."""
    ray.get(host.converse.remote(2, said, new))
    rounds = [ray.get(host.converse.remote(turns, said, new)) for _ in range(repeat)]
    return {
        mode: sum(1e3 * median(turn) for turn in zip(*(one[mode] for one in rounds), strict=True))
        for mode in ("off", "key")
    }
