"""What only the LMDeploy engine promises, on the real engine."""

import asyncio
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from serve_app.engines.base import Engine
from serve_app.engines.lmdeploy.engine import LmdeployEngine
from serve_app.errors import EngineUnavailable
from serve_app.records import Ids
from tests.engine_contract import (
    PROMPT,
    MakeEngine,
    agreement,
    check_rows,
    first_new_token,
    mixed_requests,
    request,
    sample,
    sample_group,
    submitted,
)
from tests.lmdeploy.conftest import Parity, load
from tests.plain_model import PlainModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG_PROMPT = [(7 * i) % 250 + 3 for i in range(700)]


def inside(engine: Engine) -> Any:
    """LMDeploy's own engine."""
    return cast(LmdeployEngine, engine)._backend.engine


async def test_parity_with_the_transformers_engine(parities: list[Parity]) -> None:
    for one, least in zip(parities, (1.0, 0.99), strict=True):
        dtype = {"float32": "float16"}.get(one.dtype, one.dtype)
        engine = load(one.path, dtype=dtype)
        same, places = 0.0, 0
        for wanted, theirs in zip(one.wanted, one.rollouts, strict=True):
            ours = await sample(engine, wanted)
            assert ours.ids == theirs.ids
            assert ours.text == theirs.text
            assert theirs.record is not None
            same += agreement(ours.record, theirs.record.ids) * len(theirs.record.ids)
            places += len(theirs.record.ids)
            torch.testing.assert_close(
                torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=3e-2, rtol=0
            )
        assert same / places >= least
        await engine.stop()


async def test_abort_in_a_chunked_prefill_has_no_tokens_and_no_rows(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(engine_kwargs={"max_prefill_token_num": 64})
    await sample(engine, request())
    before = inside(engine).scheduler.scheduler_tick
    task = await submitted(engine, request(request_id="a", input_ids=LONG_PROMPT))
    while inside(engine).scheduler.scheduler_tick < before + 2:  # noqa: ASYNC110
        await asyncio.sleep(0)  # LMDeploy has no event for a step
    assert await engine.abort("a") == 1
    done = await task
    assert (done.reason, done.ids, done.record) == ("abort", [], None)
    again = await sample(engine, request(input_ids=LONG_PROMPT, max_new_tokens=4))
    check_rows(again.record, LONG_PROMPT, again.ids, engine)


async def test_a_prompt_in_chunks_has_the_rows_of_one_in_a_piece(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    engine = make_engine(engine_kwargs={"max_prefill_token_num": 64})
    other = asyncio.create_task(sample(engine, request(max_new_tokens=40)))
    done = await sample(engine, request(input_ids=LONG_PROMPT, max_new_tokens=8))
    check_rows(done.record, LONG_PROMPT, done.ids, engine)
    assert agreement(done.record, experts_of(plain, [*LONG_PROMPT, *done.ids])) == 1.0
    beside = await other
    assert agreement(beside.record, experts_of(plain, [*PROMPT, *beside.ids])) == 1.0


async def test_a_prefix_cache_hit_has_all_rows_and_new_weights_empty_it(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    engine = make_engine(engine_kwargs={"enable_prefix_caching": True})
    stats = inside(engine).scheduler.block_trie.stats
    prompt = LONG_PROMPT[:200]
    first = await sample(engine, request(input_ids=prompt))
    assert stats.num_hit_tokens == 0
    again = await sample(engine, request(input_ids=prompt))
    assert stats.num_hit_tokens >= 176
    assert first.record is not None
    assert again.record is not None
    assert again.ids == first.ids
    np.testing.assert_array_equal(again.record.ids, first.record.ids)
    turn = [*prompt, *first.ids, 9, 8, 7]
    later = await sample(engine, request(input_ids=turn))
    check_rows(later.record, turn, later.ids, engine)
    assert agreement(later.record, experts_of(plain, [*turn, *later.ids])) == 1.0
    other = {name: tensor * 0.5 for name, tensor in plain.weights().items()}
    await engine.update_weights(other, 1, "drain")
    hits = stats.num_hit_tokens
    new = await sample(engine, request(input_ids=prompt))
    assert stats.num_hit_tokens == hits
    with changed(plain, other):
        assert agreement(new.record, experts_of(plain, [*prompt, *new.ids])) == 1.0
    await engine.sleep(1)
    await engine.wake()
    awake = await sample(engine, request(input_ids=prompt))
    assert awake.ids == new.ids
    np.testing.assert_array_equal(rows(awake), rows(new))


async def test_a_group_shares_the_prompt_through_the_prefix_cache(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(engine_kwargs={"enable_prefix_caching": True})
    prompt = LONG_PROMPT[:100]
    group = await sample_group(engine, request(input_ids=prompt), 3)
    assert inside(engine).scheduler.block_trie.stats.num_hit_tokens == 2 * 96
    assert all((rows(done) == rows(group[0])).all() for done in group)
    aborted = engine.generate_group(request(request_id="g", max_new_tokens=900), 4)
    chunks = [await anext(aborted)]
    assert await engine.abort("g-0") == 1
    assert await engine.abort("g") == 3
    chunks += [chunk async for chunk in aborted]
    ends = [index for index, chunk in chunks if chunk.finish_reason == "abort"]
    assert sorted(ends) == [0, 1, 2, 3]


async def test_preempted_rollouts_keep_the_rows_that_were_sampled_from(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    engine = cast(
        LmdeployEngine, make_engine(engine_kwargs={"num_gpu_blocks": 24}, context_length=256)
    )
    wanted = [
        request(input_ids=LONG_PROMPT[k : k + 40], max_new_tokens=100, return_routed_experts=k != 3)
        for k in range(8)
    ]
    done = await asyncio.gather(*(sample(engine, one) for one in wanted))
    assert engine.recomputed > 0
    for one, rollout in zip(wanted, done, strict=True):
        assert (rollout.reason, len(rollout.ids)) == ("length", 100)
        if one.return_routed_experts:
            check_rows(rollout.record, one.input_ids, rollout.ids, engine)
            experts = experts_of(plain, [*one.input_ids, *rollout.ids])
            assert agreement(rollout.record, experts) == 1.0


async def test_sixty_four_at_once_are_each_as_alone(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    engine = make_engine(max_batch_size=64, engine_kwargs={"num_gpu_blocks": 1200})
    wanted = [one.model_copy(update={"request_id": f"r{i}"}) for i, one in enumerate(mixed(64))]
    done = await asyncio.gather(*(sample(engine, one) for one in wanted))
    for one, rollout in zip(wanted, done, strict=True):
        check_rows(rollout.record, one.input_ids, rollout.ids, engine)
        experts = experts_of(plain, [*one.input_ids, *rollout.ids])
        assert agreement(rollout.record, experts) == 1.0


async def test_rows_are_taken_in_no_call_that_may_be_cancelled(make_engine: MakeEngine) -> None:
    """One rollout begins when another one ends, and Ray cancels what a cancelled call called."""
    engine = make_engine(max_batch_size=2)
    slots: Any = cast(LmdeployEngine, engine)._slots
    call: ContextVar[str | None] = ContextVar("call", default=None)
    take, calls = slots._take_array, list[str | None]()

    async def taking(rows: Any) -> Any:
        calls.append(call.get())
        return await take(rows)

    slots._take_array = taking
    call.set("a rollout's")
    await asyncio.gather(*(sample(engine, one) for one in mixed_requests(6)))
    assert calls == [None] * 6


async def test_an_update_of_the_checkpoints_own_names_is_taken_too(
    make_engine: MakeEngine, sparse: Path
) -> None:
    from safetensors.torch import load_file

    engine = make_engine()
    before = await sample(engine, request())
    state = load_file(sparse / "model.safetensors")
    assert any(".experts.15.down_proj" in name for name in state)
    await engine.update_weights({name: one * 0.5 for name, one in state.items()}, 1, "abort")
    assert (await sample(engine, request())).ids != before.ids
    await engine.update_weights(state, 2, "abort")
    assert (await sample(engine, request())).ids == before.ids


async def test_a_dead_engine_is_noticed_and_everybody_is_told(make_engine: MakeEngine) -> None:
    engine = make_engine()
    await sample(engine, request())
    engine.check_health()
    running = await submitted(engine, request(max_new_tokens=1500))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    inside(engine).executor.model_agent.patched_model.forward = broken
    inside(engine).executor.model_agent._forward_impl = broken
    done = await running
    assert (done.reason, done.record) == ("error", None)
    assert "dead" in (done.chunks[-1].error or "")
    with pytest.raises(EngineUnavailable, match="LMDeploy's engine is dead"):
        engine.check_health()


async def test_stop_strings_and_stop_tokens_leave_no_session_behind(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    plain = await sample(engine, request(max_new_tokens=64))
    stop, _ = first_new_token(plain.ids)
    await sample(engine, request(stop_token_ids=(stop,), include_stop_token=False))
    await sample(engine, request(stop=(plain.text[3:6],), max_new_tokens=64))
    assert not inside(engine).scheduler.sessions
    assert not cast(LmdeployEngine, engine)._backend._sequences.sequences


def rows(done: Any) -> Ids:
    assert done.record is not None
    ids: Ids = done.record.ids
    return ids


def mixed(count: int) -> Any:
    return mixed_requests(count)


def experts_of(plain: PlainModel, tokens: list[int]) -> Ids:
    return plain.teacher_force(tokens[:-1])[0]


class changed:
    """The plain model with other weights, for a while."""

    def __init__(self, plain: PlainModel, state: dict[str, torch.Tensor]) -> None:
        self._plain, self._state = plain, state
        self._before = {name: tensor.clone() for name, tensor in plain.weights().items()}

    def __enter__(self) -> None:
        self._plain.model.load_state_dict(self._state)

    def __exit__(self, *_: object) -> None:
        self._plain.model.load_state_dict(self._before)
