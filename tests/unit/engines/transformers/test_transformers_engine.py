"""The Transformers engine: the contract, and what only it promises."""

import asyncio
import gc
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.engines.base import Engine
from serve_app.engines.moe import find_moe_blocks
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.errors import EngineUnavailable, InvalidRequest, WeightsMismatch
from serve_app.records import Ids
from tests.engine_contract import (
    LONG,
    NEW,
    PROMPT,
    EngineContract,
    MakeEngine,
    Started,
    Weights,
    agreement,
    check_rows,
    engine_maker,
    mixed_requests,
    request,
    sample,
    submitted,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainModel:
    """The checkpoint in plain Transformers."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        )
        self.recorder = ExpertRecorder(find_moe_blocks(self.model))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)

    @torch.inference_mode()
    def teacher_force(self, tokens: list[int]) -> tuple[Ids, torch.Tensor]:
        """One forward pass over the whole sequence."""
        with self.recorder.capture() as captured:
            logits = self.model(input_ids=torch.tensor([tokens])).logits[0]
        return captured.ids(), logits.float().log_softmax(-1)

    @torch.inference_mode()
    def teacher_force_stepwise(self, prompt: list[int], output: list[int]) -> tuple[Any, Any]:
        """The prompt in one pass, then token after token: the engine's own shapes."""
        cache, experts, logprobs = DynamicCache(), [], []
        for tokens in (prompt, *([token] for token in output[:-1])):
            with self.recorder.capture() as captured:
                logits = self.model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits
            experts.append(torch.from_numpy(captured.ids()))
            logprobs.append(logits[0, -1].float().log_softmax(-1))
        return torch.cat(experts).numpy(), torch.stack(logprobs)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def weights(self) -> Weights:
        return self.model.state_dict()


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    return write_checkpoint(path, hidden=64, layers=3, experts=16, top_k=4)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    return write_checkpoint(path, hidden=64, layers=4, experts=16, top_k=2, dense_layers=(0, 2))


@pytest.fixture(scope="session")
def plain(sparse: Path) -> PlainModel:
    return PlainModel(sparse, torch.float32)


@pytest.fixture(scope="session")
def plain_bf16(sparse: Path) -> PlainModel:
    return PlainModel(sparse, torch.bfloat16)


def load(path: Path, **overrides: Any) -> TransformersEngine:
    defaults: dict[str, Any] = {
        "model": str(path),
        "dtype": "float32",
        "max_batch_size": 8,
        "enable_return_routed_experts": True,
        "engine_kwargs": {"num_threads": 1},
    }
    return TransformersEngine(EngineArgs(**{**defaults, **overrides}))


@pytest.fixture(scope="session")
def sparse_engine(sparse: Path) -> Iterator[TransformersEngine]:
    engine = load(sparse)
    yield engine
    asyncio.run(engine.stop())


make_engine = engine_maker(load)


class TestTransformersEngine(EngineContract):
    @pytest.fixture
    def engine(self, sparse_engine: TransformersEngine) -> Engine:
        return sparse_engine

    @pytest.fixture
    def reference(self, plain: PlainModel) -> PlainModel:
        return plain


# Which experts.


async def test_dense_layers_between_are_empty_columns(make_engine: MakeEngine, mixed: Path) -> None:
    engine = make_engine(path=mixed)
    assert (engine.info.layers, engine.info.moe_layers) == (4, (1, 3))
    reference = PlainModel(mixed, torch.float32)
    wanted = mixed_requests(6)
    for one, done in zip(
        wanted, await asyncio.gather(*(sample(engine, one) for one in wanted)), strict=True
    ):
        check_rows(done.record, one.input_ids, done.ids, engine)
        assert done.record is not None
        assert not done.record.ids[:, [0, 2]].any()
        experts, _ = reference.teacher_force([*one.input_ids, *done.ids][:-1])
        assert agreement(done.record, experts) == 1.0


async def test_bf16_alone_is_bitwise_the_stepwise_pass(
    make_engine: MakeEngine, plain_bf16: PlainModel
) -> None:
    """Alone, the engine runs ``[1, P]`` and then ``[1, 1]``, as plain Transformers does.

    Same kernels on the same shapes, and the columns that the slot has beyond the sequence are
    behind its own: the softmax gives them exactly 0 and a sum is not changed by zeros at its
    end. So experts and logprobs are bitwise the same on every CPU.
    """
    engine = make_engine(dtype="bfloat16")
    done = await sample(engine, request(max_new_tokens=40, temperature=1.0, seed=3))
    experts, logprobs = plain_bf16.teacher_force_stepwise(PROMPT, done.ids)
    assert agreement(done.record, experts) == 1.0
    assert done.logprobs == logprobs.gather(-1, torch.tensor(done.ids)[:, None])[:, 0].tolist()


async def test_bf16_batched_finds_the_experts_of_one_full_pass(
    make_engine: MakeEngine, plain_bf16: PlainModel
) -> None:
    """Eight rows at once against a pass over each whole sequence: other shapes.

    The same as sets wherever this CPU's matrix products compute a row the same way whatever the
    number of rows, which the model itself is asked first; else 99 %, as between any two shapes.
    """
    tokens = [(13 * i) % 500 for i in range(40)]
    _, full = plain_bf16.teacher_force(tokens)
    _, part = plain_bf16.teacher_force(tokens[:9])
    expected = 1.0 if torch.equal(full[:9], part) else 0.99
    engine = make_engine(dtype="bfloat16")
    wanted = mixed_requests(8)
    done = await asyncio.gather(*(sample(engine, one) for one in wanted))
    for one, rollout in zip(wanted, done, strict=True):
        experts, _ = plain_bf16.teacher_force([*one.input_ids, *rollout.ids][:-1])
        assert agreement(rollout.record, experts) >= expected


async def test_the_model_keeps_what_it_wants_in_fp32(make_engine: MakeEngine) -> None:
    make_engine(dtype="bfloat16")
    model: Any = next(obj for obj in _models() if next(obj.parameters()).dtype == torch.bfloat16)
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


async def test_record_is_none_when_recording_is_off(make_engine: MakeEngine) -> None:
    engine = make_engine(enable_return_routed_experts=False)
    assert engine.info.moe_layers == (0, 1, 2)
    done = await sample(engine, request())
    assert (done.reason, done.record) == ("length", None)


async def test_sdpa_may_be_chosen(make_engine: MakeEngine, plain: PlainModel) -> None:
    engine = make_engine(engine_kwargs={"attn_implementation": "sdpa", "num_threads": 1})
    wanted = mixed_requests(8)
    done = await asyncio.gather(*(sample(engine, one) for one in wanted))
    for one, rollout in zip(wanted, done, strict=True):
        experts, _ = plain.teacher_force([*one.input_ids, *rollout.ids][:-1])
        assert agreement(rollout.record, experts) == 1.0


# Endings.


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


# Weights.


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


def copy_checkpoint(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
