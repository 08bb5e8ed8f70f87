"""An engine that costs next to nothing, so that what is around it shows."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from serve_app.config import EngineArgs
from serve_app.engines.base import EngineChunk, ModelInfo
from serve_app.errors import EngineAsleep, InvalidRequest
from serve_app.records import Record, make_record
from serve_app.types import GenerateRequest, SleepLevel, UpdateMode

if TYPE_CHECKING:
    import torch

VOCAB = 512
LAYERS, EXPERTS, TOP_K = 4, 16, 4


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that a prompt is continued with: its own sequence, told from any other's."""
    seed = 0
    for token in prompt:
        seed = (seed * 1_000_003 + token + 1) % (1 << 61)
    return [(seed ^ (number * 2_654_435_761)) % (VOCAB - 3) + 3 for number in range(count)]


class FastEngine:
    """Continues every prompt with `expected`, one token a turn of the event loop."""

    def __init__(self, args: EngineArgs, _: object = None) -> None:
        self._records = args.enable_return_routed_experts
        self._running: dict[str, asyncio.Event] = {}
        self._level: SleepLevel | None = None
        self.weight_version = 0

    @property
    def info(self) -> ModelInfo:
        return ModelInfo("fast", LAYERS, tuple(range(LAYERS)), EXPERTS, TOP_K, VOCAB, 1 << 20)

    def check(self, request: GenerateRequest) -> None:
        if not all(0 <= token < VOCAB for token in request.input_ids):
            raise InvalidRequest(f"expected input_ids in [0, {VOCAB})")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineChunk, None]:
        self.check(request)
        if self._level is not None:
            raise EngineAsleep("the engine sleeps")
        aborted = self._running.setdefault(request.request_id, asyncio.Event())
        tokens = expected(request.input_ids, request.max_new_tokens)
        try:
            for number, token in enumerate(tokens, 1):
                await asyncio.sleep(0)
                if aborted.is_set():
                    done = tokens[: number - 1]
                    yield EngineChunk([], [], "", "abort", self._record(request, done))
                    return
                if number == len(tokens):
                    record = self._record(request, tokens)
                    yield EngineChunk([token], [-1.0], f"{token} ", "length", record)
                    return
                yield EngineChunk([token], [-1.0], f"{token} ")
        finally:
            self._running.pop(request.request_id, None)

    async def generate_group(
        self, request: GenerateRequest, n: int
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        for index in range(n):
            async for chunk in self.generate(request.member(index)):
                yield index, chunk

    async def abort(self, request_id: str | None = None) -> int:
        ids = [one for one in self._running if request_id in (None, one)]
        for one in ids:
            self._running[one].set()
        return len(ids)

    async def update_weights(
        self, state: "Mapping[str, torch.Tensor]", version: int, mode: UpdateMode
    ) -> None:
        self.weight_version = version

    @property
    def sleep_level(self) -> SleepLevel | None:
        return self._level

    async def sleep(self, level: SleepLevel) -> None:
        await self.abort()
        self._level = level

    async def wake(
        self, state: "Mapping[str, torch.Tensor] | None" = None, version: int = 0
    ) -> None:
        self._level = None

    def check_health(self) -> None:
        return

    async def stop(self) -> None:
        await self.abort()

    def _record(self, request: GenerateRequest, tokens: list[int]) -> Record | None:
        rows = len(request.input_ids) + len(tokens) - 1
        if not (self._records and request.return_routed_experts and rows):
            return None
        ids = np.arange(rows * LAYERS * TOP_K, dtype=np.uint8).reshape(rows, LAYERS, TOP_K)
        return make_record(
            ids % EXPERTS,
            num_experts=EXPERTS,
            weight_version=self.weight_version,
            tokens=[*request.input_ids, *tokens][:rows],
        )
