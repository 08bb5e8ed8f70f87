"""Engines of one test, made by its fixture ``make_engine`` and stopped after it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest_asyncio

from serve_app.engines.base import Engine


class MakeEngine(Protocol):
    def __call__(self, **overrides: Any) -> Engine: ...


def engine_maker(
    load: Callable[..., Engine], loop_scope: Literal["function", "module"] = "function"
) -> Any:
    """Return the fixture ``make_engine``: engines of one test, stopped after it."""

    @pytest_asyncio.fixture(loop_scope=loop_scope)
    async def make_engine(sparse: Path) -> AsyncIterator[MakeEngine]:
        made: list[Engine] = []

        def make(path: Path = sparse, **overrides: Any) -> Engine:
            made.append(load(path, **overrides))
            return made[-1]

        yield make
        for engine in made:
            await engine.stop()

    return make_engine
