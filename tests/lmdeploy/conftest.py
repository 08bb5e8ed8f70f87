"""The real LMDeploy engine on a CPU. It patches torch in this process, so these tests run last."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

os.environ["LMDEPLOY_SKIP_WARMUP"] = "1"

from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs
from serve_app.deployments.rollout.loading import load_engine
from serve_app.engines.base import Engine
from serve_app.types import GenerateRequest
from tests.engine_contract import Sampled, engine_maker, mixed_requests, request, sample
from tests.lmdeploy.served.graphs import SMALL
from tests.lmdeploy.served.pretended_gpus import pretended_gpus
from tests.lmdeploy_engines import plain, small_args
from tests.plain_model import PlainModel

__all__ = ["make_engine", "plain"]

FOUR_HUNDRED = [(13 * i) % 500 + 3 for i in range(400)]
HERE = str(Path(__file__).parent)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if str(item.path).startswith(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.lmdeploy)
        for theirs in ("torch", "lmdeploy", "xgrammar", "mmengine"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore:::{theirs}"))
    items[:] = [item for item in items if item not in ours] + ours


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    return write_checkpoint(path, hidden=64, layers=3, experts=16, top_k=4)


@dataclass(frozen=True)
class Parity:
    """Greedy requests on one checkpoint and what the Transformers engine made of them."""

    path: Path
    dtype: str
    wanted: list[GenerateRequest]
    rollouts: list[Sampled]


async def _sample_all(engine: Engine, wanted: list[GenerateRequest]) -> list[Sampled]:
    try:
        return await asyncio.gather(*(sample(engine, one) for one in wanted))
    finally:
        await engine.stop()


@pytest.fixture(scope="session")
def parities(tmp_path_factory: pytest.TempPathFactory) -> list[Parity]:
    """In float32 and in bfloat16, before torch is patched."""
    found = []
    for dtype, spread in (("float32", 0.09), ("bfloat16", 0.02)):
        path = tmp_path_factory.mktemp(dtype)
        write_checkpoint(
            path, hidden=64, layers=3, experts=8, top_k=2, initializer_range=spread, context=512
        )
        wanted = mixed_requests(8) if dtype == "float32" else [request(input_ids=FOUR_HUNDRED)]
        args = EngineArgs(model=str(path), dtype=dtype, enable_return_routed_experts=True)
        rollouts = asyncio.run(_sample_transformers(args, wanted))
        found.append(Parity(path, dtype, wanted, rollouts))
    return found


async def _sample_transformers(args: EngineArgs, wanted: list[GenerateRequest]) -> list[Sampled]:
    return await _sample_all(load_engine(args), wanted)


@pytest.fixture(scope="session", autouse=True)
def cpu(plain: PlainModel, parities: list[Parity]) -> None:
    from tests.lmdeploy.cpu_backend import install

    install()


@pytest.fixture(scope="module", autouse=True)
def unthreaded(one_thread: None) -> None:
    """Small products wait for each other where they have two threads on a busy machine."""


@pytest.fixture(scope="session")
def cluster(cpu: None) -> Iterator[Cluster]:
    with pretended_gpus() as nodes:
        yield nodes


def load(path: Path, **overrides: Any) -> Engine:
    """Return an engine on the running loop; ``engine_kwargs`` are added to the small ones."""
    return load_engine(small_args(path, SMALL, **overrides))


make_engine = engine_maker(load, loop_scope="module")
