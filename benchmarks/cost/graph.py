"""The whole graph on one GPU, once without routes, once with arrays and once with keys.

Five modes share three applications and take turns: ``off`` records nothing; ``unasked`` records
and nobody asks; ``dropped`` is asked and the replica drops what it has; ``inline`` answers with
the array; ``key`` puts it into a shard. What one costs more than the one before is that step's.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from ray import serve

from benchmarks.harness.lmdeploy_engine import without_cuda
from graphs.rollout import build
from serve_app.client import AsyncRoutedExpertsClient
from serve_app.config import RolloutArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.types import GenerateRequest, GenerateResult

APPLICATIONS = {"off": (False, False), "array": (True, False), "key": (True, True)}
MODES = {"off": "off", "unasked": "array", "dropped": "array", "inline": "array", "key": "key"}
DROPPED = "dropped-"


class DroppingEngine(InferenceEngine):
    """A replica that drops the routes of some requests, once it has their records."""

    def __init__(self, *args: Any) -> None:
        without_cuda()
        super().__init__(*args)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        result = await super().generate(request)
        if request.request_id.startswith(DROPPED):
            return replace(result, routed_experts=None, routed_experts_error=None)
        return result


def application(
    name: str, model: Path, most: int, gpus: float, engine_kwargs: dict[str, Any]
) -> serve.RunTarget:
    """Compose one application that takes a share of the GPU."""
    records, by_key = APPLICATIONS[name]
    cpus = 1 if gpus else 0  # a machine without GPUs may have two
    args = {
        "engine": {
            "backend": "lmdeploy",
            "model": str(model),
            "dtype": "bfloat16" if gpus else "float16",
            "max_batch_size": most,
            "enable_return_routed_experts": records,
            "enable_transfer_obj_ref": by_key,
            "engine_kwargs": {"enable_prefix_caching": True} | engine_kwargs,
            "serve": {"num_gpus": gpus, "num_cpus": cpus, "max_ongoing_requests": 2 * most},
        },
        "decoder": {"serve": {"num_cpus": cpus / 2}},
    }
    with mock.patch("graphs.rollout.InferenceEngine", DroppingEngine):
        graph = build(RolloutArgs.model_validate(args))
    return serve.RunTarget(graph, name=name, route_prefix=None)


class Rollouts:
    """Samples in the applications; every mode gets the same prompts."""

    def __init__(self, timeout_s: float) -> None:
        self._clients = {
            name: AsyncRoutedExpertsClient(name, generate_timeout_s=timeout_s)
            for name in APPLICATIONS
        }
        self._numbers = itertools.count()

    async def together(self, mode: str, prompts: Sequence[list[int]], new: int) -> float:
        """Return the tokens a second of so many rollouts at once, routes handed over."""
        begun = time.perf_counter()
        results = await asyncio.gather(*(self.sample(mode, prompt, new) for prompt in prompts))
        took = time.perf_counter() - begun
        await self.release(mode, results)
        return len(prompts) * new / took

    async def steadily(self, mode: str, seed: int, prompt: int, new: int, at_once: int) -> float:
        """Return the tokens a second while so many run at all times, one beginning as one ends.

        They are of lengths around ``new``; counted is what ends after the first and before the
        last time that all places are taken anew.
        """
        rng = random.Random(seed)
        wanted = iter(
            [
                (a_prompt(rng, prompt), rng.randint(new // 2, new + new // 2))
                for _ in range(4 * at_once)
            ]
        )
        ended: list[tuple[float, int]] = []

        async def one_after_another() -> None:
            for tokens, count in wanted:
                result = await self.sample(mode, tokens, count)
                ended.append((time.perf_counter(), count))
                await self.release(mode, [result])

        await asyncio.gather(*(one_after_another() for _ in range(at_once)))
        counted = ended[at_once : 3 * at_once]
        took = counted[-1][0] - ended[at_once - 1][0]
        return sum(count for _, count in counted) / took

    async def converse(self, mode: str, seed: int, turns: int, new: int, said: int) -> float:
        """Return the seconds of one conversation; ``said`` tokens a turn come from the user."""
        rng = random.Random(seed)
        tokens, results = a_prompt(rng, 4 * said), list[GenerateResult]()
        begun = time.perf_counter()
        for _ in range(turns):
            key = results[-1].routed_experts if results and mode == "key" else None
            assert key is None or isinstance(key, str)
            results.append(await self.sample(mode, tokens, new, key))
            tokens = [*tokens, *results[-1].output_ids, *a_prompt(rng, said)]
        took = time.perf_counter() - begun
        await self.release(mode, results)
        return took

    async def sample(
        self, mode: str, prompt: list[int], new: int, key: str | None = None
    ) -> GenerateResult:
        number = next(self._numbers)
        request = GenerateRequest(
            request_id=f"{DROPPED if mode == 'dropped' else ''}{number}",
            input_ids=prompt,
            max_new_tokens=new,
            temperature=1.0,
            ignore_eos=True,
            return_routed_experts=mode not in ("off", "unasked"),
            continue_from=key,
        )
        result = await self._clients[MODES[mode]].generate(request)
        assert len(result.output_ids) == new, result.error
        handed = result.routed_experts is not None
        assert handed == (mode in ("inline", "key")), result.routed_experts_error
        return result

    async def release(self, mode: str, results: Sequence[GenerateResult]) -> None:
        keys = [r.routed_experts for r in results if isinstance(r.routed_experts, str)]
        if keys:
            await self._clients[MODES[mode]].release(keys)


def a_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 256) for _ in range(length)]
