"""How an engine samples: seeds, limits, biases and company."""

import asyncio

import pytest

from serve_app.engines.base import Engine
from tests.engine_contract.records import agreement, check_rows
from tests.engine_contract.requests import PROMPT, mixed_requests, request, varied
from tests.engine_contract.rollouts import sample, visible_piece
from tests.engine_contract.tolerances import Tolerances


class Sampling(Tolerances):
    async def test_concurrent_requests_equal_each_alone(self, engine: Engine) -> None:
        wanted = mixed_requests(10)
        together = await asyncio.gather(*(sample(engine, one) for one in wanted))
        for one, rollout in zip(wanted, together, strict=True):
            alone = await sample(engine, one.model_copy(update={"request_id": "alone"}))
            assert rollout.ids == alone.ids
            assert rollout.text == alone.text
            assert alone.record is not None
            columns = list(alone.record.moe_layers)
            assert agreement(rollout.record, alone.record.ids[:, columns]) >= self.min_agreement

    async def test_a_seed_reproduces(self, engine: Engine) -> None:
        wanted = [request(temperature=1.0, seed=seed) for seed in (1, 2, 1)]
        first, other, again = [await sample(engine, one) for one in wanted]
        assert first.ids == again.ids
        assert first.logprobs == pytest.approx(again.logprobs, abs=self.again_tolerance, rel=0)
        assert first.ids != other.ids

    async def test_no_seed_samples_differently(self, engine: Engine) -> None:
        one, two = [await sample(engine, request(temperature=50.0)) for _ in range(2)]
        assert one.ids != two.ids

    async def test_top_k_of_one_is_greedy(self, engine: Engine) -> None:
        greedy = await sample(engine, request())
        assert (await sample(engine, request(temperature=1.0, top_k=1))).ids == greedy.ids
        assert (await sample(engine, request(temperature=1.0, top_p=1e-9))).ids == greedy.ids

    async def test_no_stop_before_the_least_number_of_tokens(self, engine: Engine) -> None:
        plain = await sample(engine, request())
        stop = plain.ids[0]
        done = await sample(engine, request(stop_token_ids=(stop,), min_new_tokens=5))
        assert stop not in done.ids[:5]
        assert len(done.ids) >= 5
        check_rows(done.record, PROMPT, done.ids, engine)

    async def test_no_stop_string_before_the_least_number_of_tokens(self, engine: Engine) -> None:
        plain = await sample(engine, varied(max_new_tokens=24))
        stop = visible_piece(plain.text, 0)
        done = await sample(engine, varied(max_new_tokens=24, stop=(stop,), min_new_tokens=22))
        assert done.ids[:22] == plain.ids[:22]
        assert done.text[:8] == plain.text[:8]

    async def test_a_bias_and_penalties_decide_but_logprobs_stay_raw(self, engine: Engine) -> None:
        plain = await sample(engine, request())
        forced = await sample(engine, request(logit_bias={plain.ids[0]: 1000.0}))
        assert set(forced.ids) == {plain.ids[0]}
        assert forced.logprobs[0] == pytest.approx(plain.logprobs[0], abs=1e-4)
        varied = await sample(engine, request(presence_penalty=1000.0))
        assert len(set(varied.ids)) == len(varied.ids)
        unheard = await sample(engine, request(repetition_penalty=1e9))
        assert set(unheard.ids).isdisjoint(PROMPT)
        check_rows(unheard.record, PROMPT, unheard.ids, engine)

    async def test_min_p_of_one_is_greedy(self, engine: Engine) -> None:
        greedy = await sample(engine, request())
        assert (await sample(engine, request(temperature=1.0, min_p=1.0))).ids == greedy.ids
