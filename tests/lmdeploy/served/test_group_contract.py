"""Engine groups do what every engine must: tensor parallel, and data with expert parallel.

Each is a Serve replica with one placement group, a bundle and a pretended GPU for each worker.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from ray.cluster_utils import Cluster

from serve_app.engines.base import Engine
from tests.engine_contract import LONG, MakeEngine, request, sample, sample_group
from tests.engine_contract.aborts import Aborts
from tests.engine_contract.groups import Groups
from tests.engine_contract.queue import Queue
from tests.engine_contract.refusals import Refusals
from tests.engine_contract.rollouts import begun
from tests.engine_contract.rows import Rows
from tests.engine_contract.sampling import Sampling
from tests.engine_contract.sleep import Sleep
from tests.engine_contract.text import Text
from tests.engine_contract.weights import WeightUpdates
from tests.lmdeploy.served.engine import ServedEngine
from tests.lmdeploy.served.graphs import remove, served
from tests.plain_model import PlainModel


class GroupContract(Refusals, Sleep, WeightUpdates, Queue, Aborts, Groups, Sampling, Text, Rows):
    """The contract through a replica; Serve stops it, see `test_groups`."""

    @pytest.fixture
    def engine(self, group: ServedEngine) -> Engine:
        return group.limited()

    @pytest_asyncio.fixture(loop_scope="module")
    async def make_engine(self, group: ServedEngine) -> AsyncIterator[MakeEngine]:
        yield lambda **limits: group.limited(**limits)
        await group.stop()

    @pytest.fixture
    def reference(self, plain: PlainModel) -> PlainModel:
        return plain

    async def test_a_group_ends_as_a_whole_or_one_by_one(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2)
        wanted = request(request_id="g", max_new_tokens=LONG)
        group = await begun(engine, sample_group(engine, wanted, 4))
        assert await engine.abort("g-1") == 1
        assert await engine.abort("g-3") == 1
        assert await engine.abort("g") == 2
        assert [done.reason for done in await group] == ["abort"] * 4
        closed = await begun(engine, sample_group(engine, wanted, 4))
        closed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closed
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tp(cluster: Cluster, sparse: Path) -> AsyncIterator[ServedEngine]:
    served("tp", sparse, context_length=2048, tp=2)
    yield ServedEngine("tp")
    remove("tp")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ep(cluster: Cluster, sparse: Path) -> AsyncIterator[ServedEngine]:
    served("ep", sparse, context_length=2048, dp=2, ep=2)
    yield ServedEngine("ep")
    remove("ep")


@pytest.mark.asyncio(loop_scope="module")
class TestTensorParallel(GroupContract):
    @pytest.fixture
    def group(self, tp: ServedEngine) -> ServedEngine:
        return tp


@pytest.mark.asyncio(loop_scope="module")
class TestExpertParallel(GroupContract):
    again_tolerance = 1e-4  # other ranks' dummy rows make products of other shapes

    @pytest.fixture
    def group(self, ep: ServedEngine) -> ServedEngine:
        return ep
