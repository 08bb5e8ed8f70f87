"""One LMDeploy engine in an actor, profiled while many rollouts decode: what a step consists of."""

import asyncio
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

from benchmarks.harness.lmdeploy_engine import without_cuda
from serve_app.config import EngineArgs
from serve_app.types import GenerateRequest

WAYS = {
    "off": (False, False, True),
    "unasked": (True, False, True),
    "theirs": (True, True, False),
    "asked": (True, True, True),
}
"""Whether the engine records, whether it is asked, and whether the adapter changes how."""


class ProfiledEngine:
    """An actor with one engine, without graph or store: records are made and thrown away."""

    def __init__(self, args: EngineArgs, way: str) -> None:
        without_cuda()
        import torch

        from benchmarks.cost.watched import lmdeploys_own_way
        from serve_app.deployments.rollout.loading import load_engine

        records, self._asks, ours = WAYS[way]
        args = args.model_copy(update={"enable_return_routed_experts": records})
        with nullcontext() if ours else lmdeploys_own_way():
            engine: Any = load_engine(args)
        self._engine = engine
        self._cuda = torch.cuda.is_available()
        self._outputs, self._due = 0, 0
        self._reached = asyncio.Event()
        agent = self._engine._backend.engine.executor.model_agent
        push = agent._push_output

        def counting(output: Any) -> None:
            self._outputs += 1
            if self._outputs == self._due:
                self._reached.set()
            push(output)

        agent._push_output = counting

    async def ready(self) -> None:
        """Answer once the engine is there."""

    async def run(self, prompts: list[list[int]], new: int) -> float:
        """Return the tokens a second of so many rollouts at once."""
        begun = time.perf_counter()
        await asyncio.gather(*(self._sample(prompt, new) for prompt in prompts))
        return len(prompts) * new / (time.perf_counter() - begun)

    async def profile(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Return what one step runs in the second half of so many rollouts at once."""
        from torch.profiler import ProfilerActivity, profile

        sampling = [asyncio.create_task(self._sample(prompt, new)) for prompt in prompts]
        await self._steps(new // 2)
        activities = [ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]
        begun, spent, first = time.perf_counter(), time.process_time(), self._outputs
        with profile(activities=activities) as profiler:
            await self._steps(new // 4)
        steps, wall = self._outputs - first, time.perf_counter() - begun
        spent = time.process_time() - spent
        await asyncio.gather(*sampling)
        return self._summary(profiler, steps) | {
            "steps": steps,
            "wall_ms": round(1e3 * wall / steps, 3),
            "cpu_ms": round(1e3 * spent / steps, 3),
        }

    async def _steps(self, count: int) -> None:
        """Wait until so many more steps have been run."""
        self._due = self._outputs + count
        self._reached.clear()
        await self._reached.wait()

    def _summary(self, profiler: Any, steps: int) -> dict[str, Any]:
        counts, times = Counter[str](), Counter[str]()
        for event in profiler.key_averages():
            time_us = event.self_device_time_total if self._cuda else event.self_cpu_time_total
            counts[event.key] += event.count
            times[event.key] += time_us
        copies = sum(count for name, count in counts.items() if "DtoH" in name)
        return {
            "kernels": round(sum(counts.values()) / steps, 1),
            "device_us": round(sum(times.values()) / steps, 1),
            "copies_to_host": round(copies / steps, 2),
            "by_name": {name: round(count / steps, 2) for name, count in counts.items()},
        }

    async def _sample(self, prompt: list[int], new: int) -> None:
        request = GenerateRequest(
            input_ids=prompt,
            max_new_tokens=new,
            temperature=1.0,
            ignore_eos=True,
            return_routed_experts=self._asks,
        )
        chunks = [chunk async for chunk in self._engine.generate(request)]
        assert chunks[-1].error is None, chunks[-1].error


def compared(found: dict[str, dict[str, Any]], most: int = 12) -> dict[str, Any]:
    """Return each way's figures, and the names that it runs more often than ``off``."""
    off = found["off"]["by_name"]
    lines = {}
    for way, figures in found.items():
        names = figures["by_name"]
        more = {name: round(names[name] - off.get(name, 0), 2) for name in names}
        often = sorted(more.items(), key=lambda item: -item[1])[:most]
        figures = {name: value for name, value in figures.items() if name != "by_name"}
        lines[way] = figures | {"more_than_off": {n: c for n, c in often if c > 0.01}}
    return lines
