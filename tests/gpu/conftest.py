"""LMDeploy on a CUDA device. Nothing is patched: what runs here is what serves."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs
from serve_app.engines.base import Engine
from serve_app.engines.loading import load_engine
from tests.unit.engine_contract import MakeEngine
from tests.unit.test_transformers_engine import PlainModel

HERE = str(Path(__file__).parent)
SMALL = {
    "eager_mode": True,  # capturing graphs takes seconds an engine; test_graph.py runs with them
    "cache_max_entry_count": 0.05,
    "block_size": 16,
    "max_prefill_token_num": 512,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # LMDeploy's and Triton's


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    return write_checkpoint(path, hidden=128, layers=3, experts=16, top_k=4)


@pytest.fixture(scope="session")
def plain(sparse: Path) -> PlainModel:
    return PlainModel(sparse, torch.float32)


def load(path: Path, **overrides: Any) -> Engine:
    """Return an engine on the running loop; ``engine_kwargs`` are added to the small ones.

    An engine leaves its stream current when it ends. CUDA's streams are few and used again, and
    LMDeploy refuses to begin where its own is current already.
    """
    torch.cuda.set_stream(torch.cuda.default_stream())
    defaults: dict[str, Any] = {
        "backend": "lmdeploy",
        "model": str(path),
        "dtype": "float16",
        "max_batch_size": 8,
        "enable_return_routed_experts": True,
    }
    kwargs = {**SMALL, **overrides.pop("engine_kwargs", {})}
    return load_engine(EngineArgs(**{**defaults, **overrides}, engine_kwargs=kwargs))


@pytest_asyncio.fixture(loop_scope="module")
async def make_engine(sparse: Path) -> AsyncIterator[MakeEngine]:
    made: list[Engine] = []

    def make(path: Path = sparse, **overrides: Any) -> Engine:
        made.append(load(path, **overrides))
        return made[-1]

    yield make
    for engine in made:
        await engine.stop()
