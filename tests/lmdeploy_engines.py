"""What tests of LMDeploy share, on a CPU and on a GPU: small engines, a plain model beside."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from serve_app.config import EngineArgs
from serve_app.engines.base import Engine
from tests.unit.engine_contract import MakeEngine
from tests.unit.test_transformers_engine import PlainModel


def small_args(path: Path, small: dict[str, Any], **overrides: Any) -> EngineArgs:
    """Return arguments of an engine for 8 rollouts; ``engine_kwargs`` are added to ``small``."""
    defaults: dict[str, Any] = {
        "backend": "lmdeploy",
        "model": str(path),
        "dtype": "float16",  # float32 on a CPU
        "max_batch_size": 8,
        "enable_return_routed_experts": True,
    }
    kwargs = {**small, **overrides.pop("engine_kwargs", {})}
    return EngineArgs(**{**defaults, **overrides}, engine_kwargs=kwargs)


@pytest.fixture(scope="session")
def plain(sparse: Path) -> PlainModel:
    """The reference; on a CPU made before torch is patched, or it would compute other things."""
    return PlainModel(sparse, torch.float32)


def engine_maker(load: Callable[..., Engine]) -> Any:
    """Return the fixture ``make_engine``: engines of one test, stopped after it."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def make_engine(sparse: Path) -> AsyncIterator[MakeEngine]:
        made: list[Engine] = []

        def make(path: Path = sparse, **overrides: Any) -> Engine:
            made.append(load(path, **overrides))
            return made[-1]

        yield make
        for engine in made:
            await engine.stop()

    return make_engine
