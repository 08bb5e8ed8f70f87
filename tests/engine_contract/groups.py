"""Groups of rollouts: their members, their ends and their refusals."""

import asyncio

import pytest

from serve_app.errors import EngineOverloaded, InvalidRequest
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import agreement, check_rows
from tests.engine_contract.reference import Reference
from tests.engine_contract.requests import LONG, PROMPT, request
from tests.engine_contract.rollouts import Started, sample, sample_group
from tests.engine_contract.tolerances import Tolerances


class Groups(Tolerances):
    async def test_a_group_samples_as_its_members_alone(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine(max_batch_size=4)
        wanted = request(temperature=1.0, seed=5)
        other = asyncio.create_task(sample(engine, request(max_new_tokens=15)))
        group = await sample_group(engine, wanted, 5)
        for index, done in enumerate(group):
            alone = await sample(engine, wanted.member(index))
            assert (done.ids, done.text, done.reason) == (alone.ids, alone.text, "length")
            check_rows(done.record, PROMPT, done.ids, engine)
            experts, _ = reference.teacher_force([*PROMPT, *done.ids][:-1])
            assert agreement(done.record, experts) >= self.min_agreement
        assert len({tuple(done.ids) for done in group}) > 1
        assert (await other).reason == "length"

    async def test_a_group_ends_as_a_whole_or_one_by_one(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2)
        wanted = request(request_id="g", max_new_tokens=LONG)
        group = engine.generate_group(wanted, 4)
        chunks = [await anext(group)]
        assert await engine.abort("g-1") == 1
        assert await engine.abort("g-3") == 1
        assert await engine.abort("g") == 2
        chunks += [chunk async for chunk in group]
        ends = [index for index, chunk in chunks if chunk.finish_reason == "abort"]
        assert sorted(ends) == [0, 1, 2, 3]
        closed = engine.generate_group(wanted, 4)
        await anext(closed)
        await closed.aclose()
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0

    async def test_a_group_that_can_never_run_is_refused(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2, max_waiting=1)
        with pytest.raises(InvalidRequest, match="1 to 3 rollouts, got 4"):
            await sample_group(engine, request(), 4)
        with pytest.raises(InvalidRequest, match="seed in "):
            await sample_group(engine, request(seed=2**64 - 2), 3)
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        with pytest.raises(EngineOverloaded, match="there are 1, and 3 came"):
            await sample_group(engine, request(), 3)
        await engine.abort()
        await run.rest()
        assert len(await sample_group(engine, request(), 3)) == 3
