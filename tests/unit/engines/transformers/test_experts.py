"""Which experts the Transformers engine records."""

import asyncio
from pathlib import Path

import pytest
import torch

from examples.tiny_moe import write_checkpoint
from tests.engine_contract import (
    PROMPT,
    MakeEngine,
    agreement,
    check_rows,
    mixed_requests,
    request,
    sample,
)
from tests.plain_model import PlainModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    return write_checkpoint(path, hidden=64, layers=4, experts=16, top_k=2, dense_layers=(0, 2))


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
