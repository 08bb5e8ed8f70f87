"""What engines with a running batch have in common: requests go in, chunks come out."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from serve_app.config import EngineArgs
from serve_app.engines.base import EngineChunk, ModelInfo
from serve_app.engines.request_rules import RequestRules
from serve_app.engines.stream import ChunkStream
from serve_app.errors import InvalidRequest
from serve_app.types import GenerateRequest, SleepLevel


class Streaming(Protocol):
    """A rollout whose chunks come through a stream."""

    stream: ChunkStream


R = TypeVar("R", bound=Streaming)


class AnsweringEngine(ABC, Generic[R]):
    """The part of the `Engine` Protocol that deals with requests; the batch is a subclass's."""

    def __init__(self, args: EngineArgs, info: ModelInfo, *, has_tokenizer: bool) -> None:
        self._args = args
        self._info = info
        self._rules = RequestRules(info, has_tokenizer=has_tokenizer)
        self._sleep_level: SleepLevel | None = None

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        return self._info

    @property
    def sleep_level(self) -> SleepLevel | None:
        """How deep it sleeps, None while it serves."""
        return self._sleep_level

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a request that this model can never serve."""
        self._rules.check(request)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineChunk, None]:
        """Sample one rollout; see `Engine`. Raises when the iteration begins."""
        async with aclosing(self._sample([request], None)) as chunks:
            async for _, chunk in chunks:
                yield chunk

    async def generate_group(
        self, request: GenerateRequest, n: int
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        """Sample ``n`` rollouts of one prompt; see `Engine`. Raises when the iteration begins."""
        most = self._args.max_batch_size + self._args.max_waiting
        if not 1 <= n <= most:
            raise InvalidRequest(f"expected a group of 1 to {most} rollouts, got {n}")
        members = [request.member(index) for index in range(n)]
        async with aclosing(self._sample(members, request.request_id)) as chunks:
            async for index, chunk in chunks:
                yield index, chunk

    @abstractmethod
    def _submit(
        self, requests: Sequence[GenerateRequest], filled: asyncio.Event, group: str | None
    ) -> list[R]:
        """Let checked requests into the batch; their streams set ``filled``.

        With ``group`` they are rollouts of one prompt.
        """

    @abstractmethod
    def _abandon(self, rollouts: Iterable[R]) -> None:
        """End rollouts whose reader is gone; nobody waits for it."""

    async def _sample(
        self, requests: Sequence[GenerateRequest], group: str | None
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        for request in requests:
            self.check(request)
        filled = asyncio.Event()
        live = dict(enumerate(self._submit(requests, filled, group)))
        try:
            while live:
                await filled.wait()
                filled.clear()
                for index, rollout in list(live.items()):
                    if chunk := rollout.stream.take():
                        if chunk.finish_reason is not None:
                            del live[index]
                        yield index, chunk
        finally:
            if live:
                self._abandon(live.values())
