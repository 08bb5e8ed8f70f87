"""The engine's model from load to stop: its dtypes, its sleep, a step that is stuck."""

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.errors import EngineUnavailable
from tests.engine_contract import NEW, MakeEngine, request, sample, submitted
from tests.unit.engines.transformers.checkpoints import load

pytestmark = pytest.mark.usefixtures("one_thread")


# Sleep and health.


async def test_asleep_the_model_holds_no_weights(make_engine: MakeEngine) -> None:
    engine = make_engine(dtype="float16")
    model = next(obj for obj in _models() if obj.dtype == torch.float16)
    sizes = [weight.shape for weight in model.parameters()]
    await engine.sleep(2)
    assert not any(weight.numel() for weight in model.parameters())
    await engine.wake()
    assert [weight.shape for weight in model.parameters()] == sizes


async def test_a_wedged_step_loop_makes_its_replica_unhealthy(
    make_engine: MakeEngine, sparse: Path
) -> None:
    engine = make_engine(dtype="float16", engine_kwargs={"num_threads": 1, "step_timeout_s": 0.05})
    replica = InferenceEngine(
        EngineArgs(model=str(sparse)),
        StoreArgs(backend="memory"),
        None,  # type: ignore[arg-type]  # no store is needed to be unhealthy
        lambda *_: engine,
    )
    model = next(obj for obj in _models() if obj.dtype == torch.float16)
    entered, go_on = threading.Event(), threading.Event()

    def block(*_: Any) -> None:
        entered.set()
        go_on.wait()

    hook = model.register_forward_pre_hook(block)
    task = await submitted(engine, request())
    await asyncio.to_thread(entered.wait)

    async def check_until_it_complains() -> None:
        while True:
            await replica.check_health()

    with pytest.raises(EngineUnavailable, match=r"stuck: no progress for \d+\.\d s"):
        await check_until_it_complains()
    hook.remove()
    go_on.set()
    assert (await task).reason == "length"
    await engine.abort()  # returns when the loop has turned
    await replica.check_health()


# Loading.


async def test_the_model_keeps_what_it_wants_in_fp32(make_engine: MakeEngine) -> None:
    make_engine(dtype="bfloat16")
    model: Any = next(obj for obj in _models() if next(obj.parameters()).dtype == torch.bfloat16)
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


async def test_a_dense_model_with_recording_on_is_refused_by_name(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen3 is dense"):
        load(tmp_path)
    engine = load(tmp_path, enable_return_routed_experts=False)
    assert engine.info.moe_layers == ()
    done = await sample(engine, request(input_ids=[1, 2, 3]))
    assert (done.reason, len(done.ids), done.record) == ("length", NEW, None)
    await engine.stop()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"engine_kwargs": {"attention": "eager"}},
            r"some of \['attn_implementation', .*\], got \['attention'\]",
        ),
        ({"engine_kwargs": {"num_threads": 0}}, "greater than 0"),
        ({"context_length": 4096}, "own 2048, got 4096"),
    ],
)
def test_bad_arguments_are_refused_at_load(
    sparse: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(sparse, **overrides)


async def test_stop_frees_the_model(make_engine: MakeEngine) -> None:
    before = len(_models())
    engine = make_engine()
    assert len(_models()) == before + 1
    await sample(engine, request())
    await engine.stop()
    assert len(_models()) == before


def _models() -> list[Qwen3MoeForCausalLM]:
    gc.collect()
    return [obj for obj in gc.get_objects() if type(obj) is Qwen3MoeForCausalLM]
