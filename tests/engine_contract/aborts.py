"""Aborts: what is left of a rollout, and that nothing is left running."""

import asyncio
import itertools

import pytest

from serve_app.engines.base import Engine
from serve_app.types import GenerateRequest
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import agreement, check_rows
from tests.engine_contract.reference import Reference
from tests.engine_contract.requests import LONG, PROMPT, mixed_requests, request
from tests.engine_contract.rollouts import Sampled, Started, sample, submitted
from tests.engine_contract.tolerances import Tolerances


class Aborts(Tolerances):
    async def test_abort_of_a_running_request_keeps_its_rows(self, engine: Engine) -> None:
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        assert await engine.abort("a") == 1
        done = await run.rest()
        assert done.reason == "abort"
        assert 1 <= len(done.ids) < LONG
        check_rows(done.record, PROMPT, done.ids, engine)

    async def test_abort_before_the_start_has_no_record(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        waiting = await submitted(engine, request(request_id="waits"))
        assert await engine.abort("waits") == 1
        done = await waiting
        assert (done.reason, done.ids, done.record) == ("abort", [], None)
        await run.generation.aclose()

    async def test_abort_frees_the_slot_at_once(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        waiting = await submitted(engine, request())
        assert await engine.abort("a") == 1
        assert (await waiting).reason == "length"
        assert (await run.rest()).reason == "abort"

    async def test_abort_all_ends_running_and_waiting(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2)
        runs = [await Started(engine, request(max_new_tokens=LONG)).first() for _ in range(2)]
        waiting = [await submitted(engine, request()) for _ in range(3)]
        assert await engine.abort() == 5
        assert {(await run.rest()).reason for run in runs} == {"abort"}
        assert {(await task).reason for task in waiting} == {"abort"}
        assert await engine.abort() == 0

    async def test_abort_of_an_unknown_request_is_none(self, engine: Engine) -> None:
        assert await engine.abort("nobody") == 0

    async def test_closing_the_iterator_aborts(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        await run.generation.aclose()
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0

    async def test_cancelling_the_reader_aborts(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        task = await submitted(engine, request(max_new_tokens=LONG))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0

    async def test_a_storm_of_aborts_leaves_good_records_and_nothing_running(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine(max_batch_size=4)
        fates = itertools.cycle(["finish", "abort", "close", "finish", "abort_early"])

        async def live(one: GenerateRequest, fate: str) -> Sampled | None:
            if fate == "abort_early":
                task = await submitted(engine, one)
                await engine.abort(one.request_id)
                return await task
            run = await Started(engine, one).first()
            if fate == "abort":
                await engine.abort(one.request_id)
            if fate == "close":
                await run.generation.aclose()
                return None
            return await run.rest()

        wanted = mixed_requests(20)
        done = await asyncio.gather(*map(live, wanted, fates))
        assert await engine.abort() == 0
        for one, rollout in zip(wanted, done, strict=True):
            if rollout is None:
                continue
            if not rollout.ids:
                assert (rollout.reason, rollout.record) == ("abort", None)
                continue
            check_rows(rollout.record, one.input_ids, rollout.ids, engine)
            experts, _ = reference.teacher_force([*one.input_ids, *rollout.ids][:-1])
            assert agreement(rollout.record, experts) >= self.min_agreement
