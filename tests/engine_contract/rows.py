"""An engine's records: which rows they have, and whose experts."""

import asyncio

import pytest
import torch

from serve_app.engines.base import Engine
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import agreement, check_rows
from tests.engine_contract.reference import Reference
from tests.engine_contract.requests import NEW, PROMPT, mixed_requests, request, varied
from tests.engine_contract.rollouts import first_new_token, sample
from tests.engine_contract.tolerances import Tolerances


class Rows(Tolerances):
    async def test_length_has_p_plus_g_minus_1_rows(self, engine: Engine) -> None:
        done = await sample(engine, request())
        assert (done.reason, len(done.ids), len(done.logprobs)) == ("length", NEW, NEW)
        check_rows(done.record, PROMPT, done.ids, engine)

    @pytest.mark.parametrize("prompt", [PROMPT, [7]], ids=["prompt", "one_token"])
    async def test_one_new_token(self, engine: Engine, prompt: list[int]) -> None:
        done = await sample(engine, request(input_ids=prompt, max_new_tokens=1))
        assert (done.reason, len(done.ids)) == ("length", 1)
        check_rows(done.record, prompt, done.ids, engine)

    async def test_stop_token_is_a_token_and_the_last_one_unprocessed(self, engine: Engine) -> None:
        plain = await sample(engine, varied())
        stop, place = first_new_token(plain.ids)
        done = await sample(engine, varied(stop_token_ids=(stop,)))
        assert (done.reason, done.ids) == ("stop", plain.ids[: place + 1])
        check_rows(done.record, PROMPT, done.ids, engine)

    async def test_stripped_stop_token_cuts_the_record_too(self, engine: Engine) -> None:
        plain = await sample(engine, varied())
        stop, place = first_new_token(plain.ids)
        done = await sample(engine, varied(stop_token_ids=(stop,), include_stop_token=False))
        assert (done.reason, done.ids) == ("stop", plain.ids[:place])
        expected = pytest.approx(plain.logprobs[:place], abs=self.again_tolerance, rel=0)
        assert done.logprobs == expected
        check_rows(done.record, PROMPT, done.ids, engine)

    @pytest.mark.parametrize("prompt", [PROMPT, [7]], ids=["prompt", "one_token"])
    async def test_stripped_stop_token_as_the_only_one(
        self, engine: Engine, prompt: list[int]
    ) -> None:
        [stop] = (await sample(engine, request(input_ids=prompt, max_new_tokens=1))).ids
        done = await sample(
            engine, request(input_ids=prompt, stop_token_ids=(stop,), include_stop_token=False)
        )
        assert (done.reason, done.ids, done.logprobs) == ("stop", [], [])
        if len(prompt) == 1:
            assert done.record is None  # P+0-1 rows of one token: none
        else:
            check_rows(done.record, prompt, [], engine)

    async def test_no_record_unless_asked_for(self, engine: Engine) -> None:
        unasked, asked = await asyncio.gather(
            sample(engine, request(return_routed_experts=False)), sample(engine, request())
        )
        assert unasked.record is None
        assert unasked.ids == asked.ids
        check_rows(asked.record, PROMPT, asked.ids, engine)

    async def test_recorded_experts_are_those_of_teacher_forcing(
        self, engine: Engine, reference: Reference
    ) -> None:
        wanted = mixed_requests(8)
        done = await asyncio.gather(*(sample(engine, one) for one in wanted))
        for one, rollout in zip(wanted, done, strict=True):
            tokens = [*one.input_ids, *rollout.ids][:-1]
            experts, logprobs = reference.teacher_force(tokens)
            assert agreement(rollout.record, experts) >= self.min_agreement
            expected = logprobs[len(one.input_ids) - 1 :].gather(
                -1, torch.tensor(rollout.ids)[:, None]
            )
            torch.testing.assert_close(
                torch.tensor(rollout.logprobs),
                expected.squeeze(-1),
                atol=self.logprob_tolerance,
                rtol=self.logprob_tolerance,
            )

    # Long prompts.

    async def test_long_prompts_among_short_ones_have_the_same_rows(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine(max_batch_size=3)
        long = [
            request(input_ids=[(7 * i + k) % 250 + 3 for i in range(length)], max_new_tokens=6)
            for k, length in enumerate((600, 512, 513))
        ]
        wanted = [*long, *mixed_requests(5)]
        done = await asyncio.gather(*(sample(engine, one) for one in wanted))
        for one, rollout in zip(wanted, done, strict=True):
            check_rows(rollout.record, one.input_ids, rollout.ids, engine)
            experts, _ = reference.teacher_force([*one.input_ids, *rollout.ids][:-1])
            assert agreement(rollout.record, experts) >= self.min_agreement
