"""A served replica as an `Engine`, so that the engine's contract can be held against it."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, cast

import ray
import torch

from serve_app import RoutedExpertsClient
from serve_app.engines.base import EngineChunk, ModelInfo
from serve_app.engines.request_rules import RequestRules
from serve_app.records import Record
from serve_app.types import GenerateRequest, GenerateResult, SleepLevel, UpdateMode
from serve_app.weights.holder import pack
from tests.lmdeploy.served.replica import ServedReplica

_THREADS = ThreadPoolExecutor(8, "served-engine")


class ServedEngine:
    """Calls the only replica of an application; records come by their keys.

    All requests are of one session, so that those of a group with several ranks meet on one.
    """

    def __init__(self, app: str) -> None:
        self._replica = ServedReplica(app)
        self._client = RoutedExpertsClient(app)
        self._sent = 0
        self._updating = False
        self._info: ModelInfo = self._now("info")

    def limited(self, **limits: int) -> "ServedEngine":
        """Return it with other limits than it was started with."""
        self._info = self._now(
            "limit",
            limits.get("max_batch_size", 8),
            limits.get("max_waiting", 1024),
            limits.get("context_length", 2048),
        )
        return self

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def weight_version(self) -> int:
        return cast(int, self._now("weight_version")[1])

    @property
    def sleep_level(self) -> SleepLevel | None:
        return cast("SleepLevel | None", self._now("sleep_level"))

    def check(self, request: GenerateRequest) -> None:
        RequestRules(self._info, has_tokenizer=True).check(request)

    def check_health(self) -> None:
        self._now("check_health")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineChunk, None]:
        self._sent += 1
        try:
            async with aclosing(self._replica.stream(_pinned(request))) as chunks:
                async for chunk in chunks:
                    last = () if chunk.result is None else await self._last(chunk.result)
                    yield EngineChunk(chunk.output_ids, chunk.logprobs, chunk.text, *last)
        finally:
            self._sent -= 1

    async def generate_group(
        self, request: GenerateRequest, n: int
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        self._sent += 1
        try:
            results = await self._replica.generate_group(_pinned(request), n)
        finally:
            self._sent -= 1
        for index, result in enumerate(results):
            last = await self._last(result)
            yield index, EngineChunk(result.output_ids, result.logprobs, result.text, *last)

    async def abort(self, request_id: str | None = None) -> int:
        return await self._replica.abort(request_id)

    async def update_weights(
        self, state: Mapping[str, torch.Tensor], version: int, mode: UpdateMode
    ) -> None:
        self._updating = True
        try:
            await self._replica.update_weights(pack(state), version, mode)
        finally:
            self._updating = False

    async def sleep(self, level: SleepLevel) -> None:
        await self._replica.call("sleep", level)

    async def wake(self, state: Mapping[str, torch.Tensor] | None = None, version: int = 0) -> None:
        if state is None:
            await self._replica.call("wake")
        else:
            await self._replica.call("wake_with", [ray.put(pack(state))], version)

    async def stop(self) -> None:
        """Leave it as it was found; the replica itself goes with its application."""
        await self.abort()
        if self.weight_version != 0:
            await self.sleep(2)  # it wakes as the checkpoint has it
        await self.wake()
        self.limited()

    async def reached_by(self, call: "asyncio.Task[Any]") -> None:
        await asyncio.sleep(0)
        while not call.done():
            ongoing, changing = await self._replica.call("taken")
            if ongoing >= self._sent and changing >= self._updating:
                return

    async def _last(self, result: GenerateResult) -> tuple[Any, ...]:
        record: Record | None = None
        if isinstance(result.routed_experts, str):
            record = await asyncio.to_thread(self._client.get, result.routed_experts)
            await asyncio.to_thread(self._client.release, [result.routed_experts])
        return result.finish_reason, record, result.weight_version, result.error

    def _now(self, method: str, *args: Any) -> Any:
        return _THREADS.submit(self._replica.now, method, *args).result()


def _pinned(request: GenerateRequest) -> GenerateRequest:
    return request.model_copy(update={"session": "all on one rank"})
