"""Rollouts sampled through handles. Whoever gives one up ends it, and the key that came of it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from contextvars import Context
from typing import Any

from serve_app.client.requests import failed
from serve_app.client.served import ServedGraph, await_answer, no_answer, wait_answer
from serve_app.errors import R3Error
from serve_app.sessions import is_session
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult

logger = logging.getLogger(__name__)

ABANDON_S = 2.0
"""How long one who gives up waits until the engines know it, over his time limit."""
_FETCH_S = 5.0
_FETCHES_S = 60.0
"""What is there at the end of a batch's time may still have to come over: one answer, and all."""


class RolloutCalls:
    """Calls an application's engines and waits for them, blocking or awaited.

    An answer that its caller leaves, or that comes too late, is abandoned before the caller goes
    on: Serve cancels what still runs, but a key that is on its way would live to the end of its
    lease. A request that an engine refuses is not: its id may be another one's. ``timeout_s`` is
    the limit of calls that are given none.
    """

    def __init__(self, graph: ServedGraph, timeout_s: float) -> None:
        self._graph = graph
        self._timeout_s = timeout_s

    def generate(self, request: GenerateRequest, timeout_s: float | None = None) -> GenerateResult:
        """Sample one rollout."""
        result: GenerateResult = self._wait(
            self._graph.engine.generate.remote(request), request, timeout_s
        )
        return result

    def generate_group(
        self, request: GenerateRequest, n: int, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt."""
        answer = self._graph.engine.generate_group.remote(request, n)
        results: list[GenerateResult] = self._wait(answer, request, timeout_s, n)
        return results

    def generate_batch(
        self, requests: Sequence[GenerateRequest], timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """Sample many rollouts at once; a failed one says why."""
        limit = self._limit(timeout_s)
        engine, ends = self._graph.engine, time.monotonic() + limit
        answers = [engine.generate.remote(request) for request in requests]
        results: list[GenerateResult] = []
        late: list[GenerateRequest] = []
        try:
            for request, answer in zip(requests, answers, strict=True):
                now = time.monotonic()
                fetch_s = min(_FETCH_S, max(0.0, ends + _FETCHES_S - now))
                try:
                    results.append(wait_answer(answer, max(ends - now, fetch_s)))
                except R3Error as error:
                    if _late(error):
                        late.append(request)
                        error = no_answer(limit)
                    results.append(failed(request, error))
        except BaseException:
            for answer in answers[len(results) :]:
                answer.cancel()
            late += requests[len(results) :]
            raise
        finally:
            self._abandon(late)
        return results

    def stream(
        self, request: GenerateRequest, timeout_s: float | None = None
    ) -> Generator[GenerateChunk, None, None]:
        """Sample one rollout, chunk by chunk."""
        whole, fate = False, _Fate()
        try:
            with (
                fate.told(),
                closing(self._graph.stream(request, self._limit(timeout_s))) as chunks,
            ):
                for chunk in chunks:
                    whole = chunk.result is not None
                    yield chunk
        except R3Error:
            if not whole:  # or all of it came, and then the time was over
                raise
        finally:
            if fate.given_up and not whole:
                self._abandon([request])

    async def generate_async(
        self, request: GenerateRequest, timeout_s: float | None = None
    ) -> GenerateResult:
        """Sample one rollout."""
        engine = await self._graph.engine_async()
        answer = engine.generate.remote(request)
        result: GenerateResult = await self._await(answer, request, timeout_s)
        return result

    async def generate_group_async(
        self, request: GenerateRequest, n: int, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt."""
        engine = await self._graph.engine_async()
        answer = engine.generate_group.remote(request, n)
        results: list[GenerateResult] = await self._await(answer, request, timeout_s, n)
        return results

    async def generate_batch_async(
        self, requests: Sequence[GenerateRequest], timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """Sample many rollouts at once; a failed one says why."""
        engine, late = await self._graph.engine_async(), list[GenerateRequest]()

        async def one(request: GenerateRequest) -> GenerateResult:
            fate = _Fate()
            try:
                with fate.told():
                    result: GenerateResult = await await_answer(
                        engine.generate.remote(request), self._limit(timeout_s)
                    )
                return result
            except R3Error as error:
                return failed(request, error)
            finally:
                if fate.given_up:
                    late.append(request)

        try:
            return list(await asyncio.gather(*map(one, requests)))
        finally:
            await self._abandon_async(late)

    async def stream_async(
        self, request: GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout, chunk by chunk."""
        whole, fate = False, _Fate()
        try:
            with fate.told():
                coming = self._graph.astream(request, self._limit(timeout_s))
                async with aclosing(coming) as chunks:
                    async for chunk in chunks:
                        whole = chunk.result is not None
                        yield chunk
        except R3Error:
            if not whole:
                raise
        finally:
            if fate.given_up and not whole:
                await self._abandon_async([request])

    def _wait(
        self, answer: Any, request: GenerateRequest, timeout_s: float | None, members: int = 0
    ) -> Any:
        fate = _Fate()
        try:
            with fate.told():
                return wait_answer(answer, self._limit(timeout_s))
        finally:
            if fate.given_up:
                self._abandon([request], members)

    async def _await(
        self, answer: Any, request: GenerateRequest, timeout_s: float | None, members: int = 0
    ) -> Any:
        fate = _Fate()
        try:
            with fate.told():
                return await await_answer(answer, self._limit(timeout_s))
        finally:
            if fate.given_up:
                await self._abandon_async([request], members)

    def _limit(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    async def _abandon_async(self, requests: Sequence[GenerateRequest], members: int = 0) -> None:
        if requests:
            run = asyncio.get_running_loop().run_in_executor
            await asyncio.shield(run(None, self._abandon, requests, members))

    def _abandon(self, requests: Sequence[GenerateRequest], members: int = 0) -> None:
        """Abort what runs and release what came of it; a session's id may be in use again.

        In nobody's context: Ray cancels what a cancelled call has called.
        """
        ids = [one.request_id for one in requests if not is_session(one.request_id)]
        if not ids:
            return
        calls = [("abandon", one, members) for one in ids]
        try:
            failures = Context().run(self._graph.tell_all, calls, ABANDON_S)
        except Exception as error:  # noqa: BLE001  (what led here is what its caller must hear)
            failures = [error]
        if failures:
            logger.warning(
                "keys of up to %d abandoned requests are left to their leases: %s",
                len(ids),
                failures[0],
            )


class _Fate:
    """Whether what a block waits for is given up: it was left, or the time was over."""

    def __init__(self) -> None:
        self.given_up = True

    @contextmanager
    def told(self) -> Iterator[None]:
        """Learn it from how the block ends."""
        try:
            yield
            self.given_up = False
        except R3Error as error:
            self.given_up = _late(error)
            raise


def _late(error: R3Error) -> bool:
    """Tell whether an answer did not come in time, so that it may still be on its way."""
    from ray.serve.exceptions import RequestCancelledError

    # Serve's local testing mode calls a time that is over a cancellation.
    return isinstance(error.__context__, (TimeoutError, RequestCancelledError))
