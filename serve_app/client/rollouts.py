"""Rollouts sampled through handles. Whoever gives one up ends it, and the key that came of it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any

from serve_app.client.requests import failed
from serve_app.client.served import ServedGraph, await_answer, no_answer, wait_answer
from serve_app.errors import R3Error
from serve_app.sessions import is_session
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)

ABANDON_S = 2.0


class RolloutCalls:
    """Calls an application's engines and waits for them, blocking or awaited.

    An answer that its caller leaves, or that comes too late, is abandoned before the caller goes
    on: Serve cancels what still runs, but a key that is on its way would live to the end of its
    lease. A request that an engine refuses is not: its id may be another one's.
    """

    def __init__(self, graph: ServedGraph) -> None:
        self._graph = graph

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateResult:
        """Sample one rollout."""
        return self._wait(self._graph.engine.generate.remote(request), request, timeout_s)[0]

    def generate_group(
        self, request: GenerateRequest, n: int, timeout_s: float
    ) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt."""
        answer = self._graph.engine.generate_group.remote(request, n)
        return self._wait(answer, request, timeout_s, n)

    def generate_batch(
        self, requests: Sequence[GenerateRequest], timeout_s: float
    ) -> list[GenerateResult]:
        """Sample many rollouts at once; a failed one says why."""
        engine, ends = self._graph.engine, time.monotonic() + timeout_s
        answers = [engine.generate.remote(request) for request in requests]
        results: list[GenerateResult] = []
        late: list[GenerateRequest] = []
        for request, answer in zip(requests, answers, strict=True):
            try:
                results.append(wait_answer(answer, max(0.0, ends - time.monotonic())))
            except R3Error as error:
                if _late(error):
                    late.append(request)
                    error = no_answer(timeout_s)
                results.append(failed(request, error))
        self._abandon(late)
        return results

    def stream(
        self, request: GenerateRequest, timeout_s: float
    ) -> Generator[GenerateChunk, None, None]:
        """Sample one rollout, chunk by chunk."""
        given_up = True
        try:
            with closing(self._graph.stream(request, timeout_s)) as chunks:
                for chunk in chunks:
                    given_up = chunk.result is None
                    yield chunk
        except R3Error as error:
            given_up = _late(error)
            raise
        finally:
            if given_up:
                self._abandon([request])

    async def generate_async(self, request: GenerateRequest, timeout_s: float) -> GenerateResult:
        """Sample one rollout."""
        engine = await self._graph.engine_async()
        return (await self._await(engine.generate.remote(request), request, timeout_s))[0]

    async def generate_group_async(
        self, request: GenerateRequest, n: int, timeout_s: float
    ) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt."""
        engine = await self._graph.engine_async()
        return await self._await(engine.generate_group.remote(request, n), request, timeout_s, n)

    async def stream_async(
        self, request: GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout, chunk by chunk."""
        given_up = True
        try:
            async with aclosing(self._graph.astream(request, timeout_s)) as chunks:
                async for chunk in chunks:
                    given_up = chunk.result is None
                    yield chunk
        except R3Error as error:
            given_up = _late(error)
            raise
        finally:
            if given_up:
                await self._abandon_async(request)

    def _wait(
        self, answer: Any, request: GenerateRequest, timeout_s: float, members: int = 0
    ) -> list[GenerateResult]:
        try:
            found = wait_answer(answer, timeout_s)
        except R3Error as error:
            if _late(error):
                self._abandon([request], members)
            raise
        return found if members else [found]

    async def _await(
        self, answer: Any, request: GenerateRequest, timeout_s: float, members: int = 0
    ) -> list[GenerateResult]:
        try:
            found = await await_answer(answer, timeout_s)
        except R3Error as error:
            if _late(error):
                await self._abandon_async(request, members)
            raise
        except asyncio.CancelledError:
            await self._abandon_async(request, members)
            raise
        return found if members else [found]

    async def _abandon_async(self, request: GenerateRequest, members: int = 0) -> None:
        await asyncio.shield(asyncio.to_thread(self._abandon, [request], members))

    def _abandon(self, requests: Sequence[GenerateRequest], members: int = 0) -> None:
        """Abort what runs and release what came of it; a session's id may be in use again."""
        try:
            for request in requests:
                if not is_session(request.request_id):
                    self._graph.broadcast(
                        "abandon", request.request_id, members, within_s=ABANDON_S
                    )
        except R3Error as error:
            logger.warning("keys of abandoned requests are left to their leases: %s", error)


def _late(error: R3Error) -> bool:
    """Tell whether an answer did not come in time, so that it may still be on its way."""
    return isinstance(error.__context__, TimeoutError)
