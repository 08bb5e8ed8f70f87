"""LMDeploy on a CUDA device. Nothing is patched: what runs here is what serves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.tiny_moe import write_checkpoint
from serve_app.deployments.rollout.loading import load_engine
from serve_app.engines.base import Engine
from tests.engine_contract import engine_maker
from tests.lmdeploy_engines import plain, small_args

__all__ = ["make_engine", "plain"]

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


def load(path: Path, **overrides: Any) -> Engine:
    """Return an engine on the running loop; ``engine_kwargs`` are added to the small ones.

    An engine leaves its stream current when it ends. CUDA's streams are few and used again, and
    LMDeploy refuses to begin where its own is current already.
    """
    torch.cuda.set_stream(torch.cuda.default_stream())
    return load_engine(small_args(path, SMALL, **overrides))


make_engine = engine_maker(load, loop_scope="module")
