"""Rollouts over handles that are given up: who is told, and what the caller hears."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, cast

import pytest

from serve_app.client.rollouts import RolloutCalls
from serve_app.client.served import ServedGraph, no_answer
from serve_app.errors import EngineUnavailable, InvalidRequest
from serve_app.sessions import session_name
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult

CALL: ContextVar[str | None] = ContextVar("call", default=None)


def request(name: str) -> GenerateRequest:
    return GenerateRequest(request_id=name, input_ids=[1], return_routed_experts=True)


def result(name: str) -> GenerateResult:
    return GenerateResult(
        request_id=name,
        output_ids=[2],
        logprobs=[-1.0],
        text="",
        finish_reason="length",
        prompt_tokens=1,
        weight_version=0,
        routed_experts="key",
        num_routed_tokens=1,
    )


class Answer:
    """A handle's response: comes at once, raises, or never comes."""

    def __init__(self, request: GenerateRequest, raises: BaseException | None) -> None:
        self._request = request
        self._raises = raises
        self.cancelled = False

    def result(self, timeout_s: float) -> GenerateResult:
        if self._raises is not None:
            raise self._raises
        return result(self._request.request_id)

    def __await__(self) -> Generator[Any, None, GenerateResult]:
        async def come() -> GenerateResult:
            if isinstance(self._raises, TimeoutError):
                await asyncio.Event().wait()
            return self.result(0)

        return come().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Graph:
    """A served graph of one engine, whose answers a test decides by the request's id."""

    def __init__(self, **raises: BaseException) -> None:
        self._raises = raises
        self.told: list[str] = []
        self.contexts: list[str | None] = []
        self.answers: list[Answer] = []
        self.engine = self.generate = self.generate_group = self
        self.fails = False

    def remote(self, request: GenerateRequest, n: int = 0) -> Answer:
        self.answers.append(Answer(request, self._raises.get(request.request_id)))
        return self.answers[-1]

    async def engine_async(self) -> "Graph":
        return self

    def tell_all(self, calls: Sequence[tuple[Any, ...]], within_s: float) -> list[Exception]:
        self.contexts.append(CALL.get())
        self.told += [f"{method} {name} {members}" for method, name, members in calls]
        if self.fails:
            raise RuntimeError("Serve is gone")
        return []

    def stream(
        self, request: GenerateRequest, timeout_s: float
    ) -> Generator[GenerateChunk, None, None]:
        yield GenerateChunk(request.request_id, [2], [-1.0], "", None)
        yield GenerateChunk(request.request_id, [], [], "", result(request.request_id))
        raise self._late(timeout_s)

    async def astream(
        self, request: GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        for chunk in (None, result(request.request_id)):
            yield GenerateChunk(request.request_id, [2], [-1.0], "", chunk)
        raise self._late(timeout_s)

    def _late(self, timeout_s: float) -> EngineUnavailable:
        error = no_answer(timeout_s)
        error.__context__ = TimeoutError()
        return error


def calls(graph: Graph) -> RolloutCalls:
    return RolloutCalls(cast(ServedGraph, graph), 60)


async def test_what_is_late_is_abandoned_and_what_is_refused_is_not() -> None:
    graph = Graph(late=TimeoutError(), refused=InvalidRequest("no"), dead=EngineUnavailable("x"))
    over = calls(graph)
    for name, error in (("refused", InvalidRequest), ("dead", EngineUnavailable)):
        with pytest.raises(error):
            over.generate(request(name), 1)
        with pytest.raises(error):
            await over.generate_async(request(name), 1)
    assert graph.told == []
    with pytest.raises(EngineUnavailable, match="no answer within 1"):
        over.generate(request("late"), 1)
    with pytest.raises(EngineUnavailable, match=r"no answer within 0\.01"):
        await over.generate_async(request("late"), 0.01)
    with pytest.raises(EngineUnavailable):
        over.generate_group(request("late"), 3, 1)
    assert graph.told == ["abandon late 0", "abandon late 0", "abandon late 3"]
    assert all(answer.cancelled for answer in graph.answers)


def test_a_batch_tells_once_of_all_that_is_late() -> None:
    graph = Graph(b=TimeoutError(), d=TimeoutError(), e=InvalidRequest("no"))
    results = calls(graph).generate_batch([request(name) for name in "abcde"], 7)
    assert [one.finish_reason for one in results] == ["length", "error", "length", "error", "error"]
    assert "no answer within 7 s" in str(results[1].error)
    assert graph.told == ["abandon b 0", "abandon d 0"]
    assert len(graph.contexts) == 1


async def test_so_does_one_that_is_awaited() -> None:
    graph = Graph(b=TimeoutError(), e=InvalidRequest("no"))
    results = await calls(graph).generate_batch_async([request(name) for name in "abe"], 0.01)
    assert [one.finish_reason for one in results] == ["length", "error", "error"]
    assert graph.told == ["abandon b 0"]


async def test_whoever_is_cancelled_abandons_in_nobodys_context() -> None:
    graph = Graph(late=TimeoutError())
    CALL.set("the cancelled call")
    for call in (
        calls(graph).generate_async(request("late"), 60),
        calls(graph).generate_batch_async([request("late")], 60),
    ):
        waiting = asyncio.create_task(cast(Any, call))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert graph.told == ["abandon late 0"] * 2
    assert graph.contexts == [None] * 2


def test_an_interrupt_ends_all_that_was_asked() -> None:
    graph = Graph(b=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        calls(graph).generate_batch([request(name) for name in "abc"], 7)
    assert graph.told == ["abandon b 0", "abandon c 0"]
    assert [answer.cancelled for answer in graph.answers] == [False, True, True]


async def test_what_keeps_anybody_from_being_told_is_not_what_the_caller_hears() -> None:
    graph = Graph(late=TimeoutError())
    graph.fails = True
    with pytest.raises(EngineUnavailable, match="no answer within 1"):
        calls(graph).generate(request("late"), 1)


async def test_a_stream_that_came_whole_keeps_its_key_however_long_it_was_worked_on() -> None:
    graph = Graph()
    assert len(list(calls(graph).stream(request("a"), 1))) == 2
    assert len([chunk async for chunk in calls(graph).stream_async(request("a"), 1)]) == 2
    assert graph.told == []
    next(calls(graph).stream(request("a"), 1))  # and closed
    async with aclosing(calls(graph).stream_async(request("b"), 1)) as chunks:
        await anext(chunks)
    assert graph.told == ["abandon a 0", "abandon b 0"]


def test_a_sessions_id_may_be_in_use_again() -> None:
    name = session_name(1)
    graph = Graph(**{name: TimeoutError()})
    with pytest.raises(EngineUnavailable):
        calls(graph).generate(request(name), 1)
    assert graph.told == []
