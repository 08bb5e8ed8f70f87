"""The Transformers engine does what every engine must."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.engines.base import Engine
from serve_app.engines.transformers.engine import TransformersEngine
from tests.engine_contract import EngineContract
from tests.plain_model import PlainModel
from tests.unit.engines.transformers.checkpoints import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def sparse_engine(sparse: Path) -> Iterator[TransformersEngine]:
    engine = load(sparse)
    yield engine
    asyncio.run(engine.stop())


class TestTransformersEngine(EngineContract):
    @pytest.fixture
    def engine(self, sparse_engine: TransformersEngine) -> Engine:
        return sparse_engine

    @pytest.fixture
    def reference(self, plain: PlainModel) -> PlainModel:
        return plain
