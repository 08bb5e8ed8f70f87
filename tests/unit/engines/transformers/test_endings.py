"""How a rollout of the Transformers engine ends."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.engines.transformers.expert_rows import ExpertRows
from serve_app.errors import InvalidRequest
from tests.engine_contract import LONG, NEW, PROMPT, MakeEngine, check_rows, request, sample
from tests.plain_model import PlainModel
from tests.unit.engines.transformers.checkpoints import copy_checkpoint, load

pytestmark = pytest.mark.usefixtures("one_thread")


async def test_eos_of_the_generation_config_stops(
    make_engine: MakeEngine, sparse: Path, tmp_path: Path
) -> None:
    base = await sample(make_engine(), request())
    for eos in (base.ids[4], [499, base.ids[4]]):
        path = copy_checkpoint(sparse, tmp_path / str(type(eos).__name__))
        config = path / "generation_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": eos}))
        engine = make_engine(path=path)
        done = await sample(engine, request(ignore_eos=False))
        end = base.ids.index(base.ids[4]) + 1
        assert (done.reason, done.ids) == ("stop", base.ids[:end])
        assert (await sample(engine, request())).reason == "length"


async def test_without_a_tokenizer_there_is_no_text(
    make_engine: MakeEngine, sparse: Path, tmp_path: Path
) -> None:
    path = copy_checkpoint(sparse, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    engine = make_engine(path=path)
    done = await sample(engine, request())
    assert (done.text, len(done.ids)) == ("", NEW)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        engine.check(request(stop=("x",)))


async def test_a_record_without_a_real_row_fails_its_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    with monkeypatch.context() as patched:
        patched.setattr(ExpertRows, "first", lambda rows, count: np.zeros((count, 3, 2), np.uint8))
        done = await sample(engine, request())
    assert (done.reason, done.record) == ("error", None)
    assert "expected routes, got all zeros" in str(done.chunks[-1].error)
    again = await sample(engine, request())
    check_rows(again.record, PROMPT, again.ids, engine)


async def test_logits_that_are_not_finite_fail_the_request_alone(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    engine = make_engine()
    good = plain.weights()
    bad = {name: torch.full_like(tensor, torch.nan) for name, tensor in good.items()}
    await engine.update_weights(bad, 1, "drain")
    done = await sample(engine, request(temperature=1.0))
    assert (done.reason, done.ids, done.record) == ("error", [], None)
    assert done.chunks[-1].error == "the model's logits are not finite"
    await engine.update_weights(good, 2, "drain")
    again = await sample(engine, request())
    check_rows(again.record, PROMPT, again.ids, engine)


def test_a_reader_whose_loop_is_gone_is_aborted(sparse: Path) -> None:
    engine = load(sparse, max_batch_size=1)
    loop = asyncio.new_event_loop()
    generation = engine.generate(request(max_new_tokens=LONG))
    loop.run_until_complete(anext(generation))
    loop.close()

    async def other() -> None:
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0
        await engine.stop()

    asyncio.run(other())
