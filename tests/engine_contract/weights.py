"""New weights: one version a record, and nothing changed by those that do not fit."""

import asyncio
import re
from collections.abc import Callable

import pytest
import torch

from serve_app.engines.base import Engine
from serve_app.errors import WeightsMismatch
from serve_app.types import UpdateMode
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import check_rows
from tests.engine_contract.reference import Reference, Weights
from tests.engine_contract.requests import LONG, NEW, PROMPT, request
from tests.engine_contract.rollouts import Started, begun, sample, submitted
from tests.engine_contract.tolerances import Tolerances


class WeightUpdates(Tolerances):
    @pytest.mark.parametrize("mode", ["abort", "drain"])
    async def test_every_record_has_one_version(
        self, make_engine: MakeEngine, reference: Reference, mode: UpdateMode
    ) -> None:
        engine = make_engine(max_batch_size=2)
        other = {name: tensor * 0.5 for name, tensor in reference.weights().items()}
        plain = await sample(engine, request())
        tokens = LONG if mode == "abort" else NEW  # not to end before it is aborted
        assert (engine.weight_version, plain.chunks[-1].weight_version) == (0, 0)
        runs = [
            await Started(engine, request(request_id=name, max_new_tokens=tokens)).first()
            for name in "ab"
        ]
        update = await begun(engine, engine.update_weights(other, 7, mode))
        later = await submitted(engine, request())
        await update
        assert engine.weight_version == 7
        for run in runs:
            done = await run.rest()
            assert done.reason == ("length" if mode == "drain" else "abort")
            assert done.ids[:NEW] == plain.ids[: len(done.ids)]
            assert done.record is not None
            assert done.record.weight_version == done.chunks[-1].weight_version == 0
        new = await later
        check_rows(new.record, PROMPT, new.ids, engine)
        assert new.chunks[-1].weight_version == 7
        assert new.logprobs != pytest.approx(plain.logprobs, abs=self.again_tolerance, rel=0)
        await engine.update_weights(reference.weights(), 8, mode)
        again = await sample(engine, request())
        assert again.ids == plain.ids[: len(again.ids)]

    async def test_an_update_that_nobody_waits_for_any_more_stops_nothing(
        self, engine: Engine, reference: Reference
    ) -> None:
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        update = await begun(engine, engine.update_weights(reference.weights(), 9, "drain"))
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        assert await engine.abort("a") == 1
        await run.rest()
        assert engine.weight_version != 9
        assert (await sample(engine, request())).reason == "length"

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda state, name: state.pop(name), "missing: {name}"),
            (lambda state, name: state.update(more=state[name]), "unknown: more"),
            (
                lambda state, name: state.update({name: torch.zeros(3)}),
                r"{name} expected \[\d+, \d+\], got \[3\]",
            ),
        ],
        ids=["missing", "unknown", "shape"],
    )
    async def test_weights_that_do_not_fit_change_nothing(
        self,
        engine: Engine,
        reference: Reference,
        damage: Callable[[Weights, str], object],
        message: str,
    ) -> None:
        before = await sample(engine, request())
        state = {name: torch.zeros_like(tensor) for name, tensor in reference.weights().items()}
        name = next(name for name, tensor in state.items() if ".1." in name and tensor.dim() == 2)
        damage(state, name)
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        with pytest.raises(WeightsMismatch, match=message.format(name=re.escape(name))):
            await engine.update_weights(state, 9, "abort")
        assert await engine.abort("a") == 1  # what ran was left alone
        await run.rest()
        assert engine.weight_version != 9
        assert (await sample(engine, request())).ids == before.ids
