"""The real LMDeploy engine does what every engine must."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from serve_app.engines.base import Engine
from tests.engine_contract import EngineContract
from tests.lmdeploy.conftest import load
from tests.plain_model import PlainModel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_engine(sparse: Path) -> AsyncIterator[Engine]:
    engine = load(sparse)
    yield engine
    await engine.stop()


@pytest.mark.asyncio(loop_scope="module")
class TestLmdeployEngine(EngineContract):
    @pytest.fixture
    def engine(self, one_engine: Engine) -> Engine:
        return one_engine

    @pytest.fixture
    def reference(self, plain: PlainModel) -> PlainModel:
        return plain
