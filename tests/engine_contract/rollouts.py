"""Rollouts: sampled whole, known to run, or waiting."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from serve_app.engines.base import Engine, EngineChunk
from serve_app.records import Record
from serve_app.types import FinishReason, GenerateRequest

T = TypeVar("T")


@runtime_checkable
class Remote(Protocol):
    """An engine in another process, which a call reaches later than in the next turn."""

    async def reached_by(self, call: "asyncio.Task[Any]") -> None:
        """Wait until the engine has the last call, or it has ended."""
        ...


@dataclass(frozen=True)
class Sampled:
    """One rollout, put together from its chunks."""

    chunks: list[EngineChunk]

    @property
    def ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def logprobs(self) -> list[float]:
        return [logprob for chunk in self.chunks for logprob in chunk.logprobs]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason

    @property
    def record(self) -> Record | None:
        return self.chunks[-1].record


async def sample(engine: Engine, wanted: GenerateRequest) -> Sampled:
    return await rest(engine.generate(wanted), [])


async def sample_group(engine: Engine, wanted: GenerateRequest, n: int) -> list[Sampled]:
    members: list[list[EngineChunk]] = [[] for _ in range(n)]
    async for index, chunk in engine.generate_group(wanted, n):
        members[index].append(chunk)
    assert all(chunks[-1].finish_reason is not None for chunks in members)
    return [Sampled(chunks) for chunks in members]


async def rest(generation: AsyncGenerator[EngineChunk, None], chunks: list[EngineChunk]) -> Sampled:
    chunks.extend([chunk async for chunk in generation])
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is not None
    return Sampled(chunks)


class Started:
    """A rollout that is known to run: its first token has come."""

    def __init__(self, engine: Engine, wanted: GenerateRequest) -> None:
        self.generation = engine.generate(wanted)
        self.chunks: list[EngineChunk] = []

    async def first(self) -> "Started":
        self.chunks.append(await anext(self.generation))
        return self

    async def rest(self) -> Sampled:
        return await rest(self.generation, self.chunks)


async def submitted(engine: Engine, wanted: GenerateRequest) -> "asyncio.Task[Sampled]":
    """Return a task whose request has reached the engine."""
    return await begun(engine, sample(engine, wanted))


async def begun(engine: Engine, call: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Return a task whose call has reached the engine."""
    task = asyncio.create_task(call)
    if isinstance(engine, Remote):
        await engine.reached_by(task)
    else:
        await asyncio.sleep(0)  # not a delay: one turn of the loop, in which the task begins
    return task


def first_new_token(ids: list[int]) -> tuple[int, int]:
    """Return a token, not the first, that has not been there before, and its place."""
    return next((t, i) for i, t in enumerate(ids) if i > 1 and t not in ids[:i])


def visible_piece(text: str, start: int) -> str:
    """Return a character of the text that is no replacement character."""
    return next(char for char in text[start:] if char != "\N{REPLACEMENT CHARACTER}")
