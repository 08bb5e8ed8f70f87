"""LMDeploy on CUDA does what every engine must."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from serve_app.engines.base import Engine
from tests.engine_contract import EngineContract
from tests.gpu.conftest import load
from tests.plain_model import PlainModel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_engine(sparse: Path) -> AsyncIterator[Engine]:
    engine = load(sparse)
    yield engine
    await engine.stop()


@pytest.mark.asyncio(loop_scope="module")
class TestLmdeployOnCuda(EngineContract):
    # Teacher forcing runs in float32 on the CPU, the engine in float16 with kernels of its own:
    # where two experts score nearly the same they choose differently. Some records have only 45
    # places to compare, so two of them may differ; the long ones agree in 97 % and more.
    min_agreement = 0.95
    logprob_tolerance = 0.03

    @pytest.fixture
    def engine(self, one_engine: Engine) -> Engine:
        return one_engine

    @pytest.fixture
    def reference(self, plain: PlainModel) -> PlainModel:
        return plain
