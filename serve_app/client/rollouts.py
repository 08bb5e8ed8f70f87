"""Rollouts sampled through handles. Whoever gives one up ends it, and the key that came of it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
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
        try:
            for request, answer in zip(requests, answers, strict=True):
                now = time.monotonic()
                fetch_s = min(_FETCH_S, max(0.0, ends + _FETCHES_S - now))
                try:
                    results.append(wait_answer(answer, max(ends - now, fetch_s)))
                except R3Error as error:
                    if _late(error):
                        late.append(request)
                        error = no_answer(timeout_s)
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
        self, request: GenerateRequest, timeout_s: float
    ) -> Generator[GenerateChunk, None, None]:
        """Sample one rollout, chunk by chunk."""
        whole, given_up = False, True
        try:
            with closing(self._graph.stream(request, timeout_s)) as chunks:
                for chunk in chunks:
                    whole = chunk.result is not None
                    yield chunk
        except R3Error as error:
            given_up = _late(error)
            if not whole:  # or all of it came, and then the time was over
                raise
        finally:
            if given_up and not whole:
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

    async def generate_batch_async(
        self, requests: Sequence[GenerateRequest], timeout_s: float
    ) -> list[GenerateResult]:
        """Sample many rollouts at once; a failed one says why."""
        engine, late = await self._graph.engine_async(), list[GenerateRequest]()

        async def one(request: GenerateRequest) -> GenerateResult:
            given_up = True
            try:
                result: GenerateResult = await await_answer(
                    engine.generate.remote(request), timeout_s
                )
                given_up = False
                return result
            except R3Error as error:
                given_up = _late(error)
                return failed(request, error)
            finally:
                if given_up:
                    late.append(request)

        try:
            return list(await asyncio.gather(*map(one, requests)))
        finally:
            await self._abandon_async(late)

    async def stream_async(
        self, request: GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout, chunk by chunk."""
        whole, given_up = False, True
        try:
            async with aclosing(self._graph.astream(request, timeout_s)) as chunks:
                async for chunk in chunks:
                    whole = chunk.result is not None
                    yield chunk
        except R3Error as error:
            given_up = _late(error)
            if not whole:
                raise
        finally:
            if given_up and not whole:
                await self._abandon_async([request])

    def _wait(
        self, answer: Any, request: GenerateRequest, timeout_s: float, members: int = 0
    ) -> list[GenerateResult]:
        given_up = True
        try:
            found = wait_answer(answer, timeout_s)
            given_up = False
        except R3Error as error:
            given_up = _late(error)
            raise
        finally:
            if given_up:
                self._abandon([request], members)
        return found if members else [found]

    async def _await(
        self, answer: Any, request: GenerateRequest, timeout_s: float, members: int = 0
    ) -> list[GenerateResult]:
        given_up = True
        try:
            found = await await_answer(answer, timeout_s)
            given_up = False
        except R3Error as error:
            given_up = _late(error)
            raise
        finally:
            if given_up:
                await self._abandon_async([request], members)
        return found if members else [found]

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


def _late(error: R3Error) -> bool:
    """Tell whether an answer did not come in time, so that it may still be on its way."""
    from ray.serve.exceptions import RequestCancelledError

    # Serve's local testing mode calls a time that is over a cancellation.
    return isinstance(error.__context__, (TimeoutError, RequestCancelledError))
