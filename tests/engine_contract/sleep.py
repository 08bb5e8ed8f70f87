"""An engine's sleep: refusals in it, and the same answers after it."""

import pytest
import torch

from serve_app.errors import EngineAsleep, WeightsMismatch
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import check_rows
from tests.engine_contract.reference import Reference
from tests.engine_contract.requests import LONG, PROMPT, request
from tests.engine_contract.rollouts import Started, sample, submitted
from tests.engine_contract.tolerances import Tolerances


class Sleep(Tolerances):
    async def test_asleep_it_refuses_and_awake_it_is_as_before(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine(max_batch_size=1)
        before = await sample(engine, request())
        for level in (1, 2):
            run = await Started(engine, request(max_new_tokens=LONG)).first()
            waiting = await submitted(engine, request())
            await engine.sleep(level)
            assert engine.sleep_level == level
            done = await run.rest()
            assert done.reason == "abort"
            check_rows(done.record, PROMPT, done.ids, engine)
            assert (await waiting).reason == "abort"
            with pytest.raises(EngineAsleep, match="wake"):
                await sample(engine, request())
            with pytest.raises(EngineAsleep, match="wake"):
                await engine.update_weights(reference.weights(), 3, "abort")
            engine.check_health()
            assert await engine.abort() == 0
            await engine.wake()
            assert engine.sleep_level is None
            assert (await sample(engine, request())).ids == before.ids
        await engine.wake()
        assert engine.weight_version == 0

    async def test_sleep_deepens_and_weights_may_come_with_waking(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine()
        before = await sample(engine, request())
        other = {name: tensor * 0.5 for name, tensor in reference.weights().items()}
        await engine.sleep(1)
        await engine.sleep(2)
        await engine.sleep(1)
        assert engine.sleep_level == 2
        with pytest.raises(WeightsMismatch, match="unknown: more"):
            await engine.wake({**other, "more": torch.zeros(1)}, 4)
        assert engine.sleep_level == 2
        await engine.wake(other, 4)
        new = await sample(engine, request())
        assert engine.weight_version == 4
        assert new.logprobs != pytest.approx(before.logprobs, abs=self.again_tolerance, rel=0)
        check_rows(new.record, PROMPT, new.ids, engine)
        await engine.sleep(1)
        await engine.wake()
        assert (engine.weight_version, (await sample(engine, request())).ids) == (4, new.ids)
        await engine.sleep(2)
        await engine.wake()
        assert (engine.weight_version, (await sample(engine, request())).ids) == (0, before.ids)
