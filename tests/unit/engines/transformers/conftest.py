"""The checkpoint that most tests of this engine load, and the plain model beside it."""

from pathlib import Path

import pytest
import torch

from examples.tiny_moe import write_checkpoint
from tests.engine_contract import engine_maker
from tests.plain_model import PlainModel
from tests.unit.engines.transformers.checkpoints import load


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    return write_checkpoint(path, hidden=64, layers=3, experts=16, top_k=4)


@pytest.fixture(scope="session")
def plain(sparse: Path) -> PlainModel:
    return PlainModel(sparse, torch.float32)


@pytest.fixture(scope="session")
def plain_bf16(sparse: Path) -> PlainModel:
    return PlainModel(sparse, torch.bfloat16)


make_engine = engine_maker(load)
