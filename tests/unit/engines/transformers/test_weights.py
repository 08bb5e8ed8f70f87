"""New weights: what fits, and updates that are cancelled, overtaken or fail half-way."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen3MoeForCausalLM

from serve_app.errors import EngineUnavailable, WeightsMismatch
from tests.engine_contract import LONG, MakeEngine, Started, request, sample, submitted
from tests.plain_model import PlainModel
from tests.unit.engines.transformers.checkpoints import copy_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


async def test_tied_head_may_be_absent(
    make_engine: MakeEngine, sparse: Path, tmp_path: Path
) -> None:
    path = copy_checkpoint(sparse, tmp_path / "tied")
    config = AutoConfig.from_pretrained(sparse, tie_word_embeddings=True)
    torch.manual_seed(1)  # whether half the weights choose other tokens is up to them
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    engine = make_engine(path=path)
    before = await sample(engine, request())
    state = dict(PlainModel(path, torch.float32).weights())
    del state["lm_head.weight"]
    await engine.update_weights({name: tensor * 0.5 for name, tensor in state.items()}, 1, "abort")
    assert (await sample(engine, request())).ids != before.ids
    await engine.update_weights(state, 2, "abort")
    assert (await sample(engine, request())).ids == before.ids
    del state["model.embed_tokens.weight"]
    with pytest.raises(WeightsMismatch, match=r"missing: .*embed_tokens"):
        await engine.update_weights(state, 3, "abort")


async def test_weights_of_another_dtype_are_cast(
    make_engine: MakeEngine, plain: PlainModel, plain_bf16: PlainModel
) -> None:
    engine = make_engine(dtype="bfloat16")
    before = await sample(engine, request())
    await engine.update_weights(plain.weights(), 1, "drain")
    after = await sample(engine, request())
    assert (after.ids, after.logprobs) == (before.ids, before.logprobs)


async def test_a_cancelled_update_is_withdrawn(make_engine: MakeEngine, plain: PlainModel) -> None:
    engine = make_engine()
    run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
    update = asyncio.create_task(engine.update_weights(plain.weights(), 5, "drain"))
    await asyncio.sleep(0)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    await engine.abort("a")
    await run.rest()
    assert (await sample(engine, request())).reason == "length"
    assert engine.weight_version == 0


async def test_an_aborting_update_ends_what_a_draining_one_waits_for(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    engine = make_engine()
    run = await Started(engine, request(max_new_tokens=LONG)).first()
    drain = asyncio.create_task(engine.update_weights(plain.weights(), 5, "drain"))
    await asyncio.sleep(0)
    await engine.update_weights(plain.weights(), 6, "abort")
    await drain
    assert (await run.rest()).reason == "abort"
    assert engine.weight_version == 6


async def test_weights_lost_while_draining_end_the_engine_loudly(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    """A trainer that frees its tensors too early leaves a half-loaded model: trust nothing."""
    engine = make_engine()
    state = {name: tensor.clone() for name, tensor in plain.weights().items()}
    run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
    update = asyncio.create_task(engine.update_weights(state, 5, "drain"))
    await asyncio.sleep(0)
    waiting = await submitted(engine, request())
    state["model.layers.1.mlp.gate.weight"].resize_(1)
    await engine.abort("a")
    with pytest.raises(EngineUnavailable, match="weights version 5 failed half-way"):
        await update
    assert (await run.rest()).reason == "abort"
    done = await waiting
    assert (done.reason, done.record) == ("error", None)
    assert "weights version 5 failed half-way" in (done.chunks[-1].error or "")
    for refused in (sample(engine, request()), engine.update_weights(plain.weights(), 6, "drain")):
        with pytest.raises(EngineUnavailable, match="weights version 5"):
            await refused
    with pytest.raises(EngineUnavailable, match="weights version 5"):
        engine.check_health()
