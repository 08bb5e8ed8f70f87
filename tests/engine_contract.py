"""What every engine must do, written against the Protocol alone.

A test module subclasses `EngineContract` and provides three fixtures: ``engine`` (records on, a
tokenizer of one token a byte, at least 4 slots), ``make_engine`` (the same with other
`EngineArgs`, stopped after the test) and ``reference`` (the same model in plain Transformers).
"""

import asyncio
import itertools
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import pytest_asyncio
import torch

from serve_app.engines.base import Engine, EngineChunk
from serve_app.errors import (
    EngineAsleep,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    WeightsMismatch,
)
from serve_app.records import Ids, Record, hash_tokens
from serve_app.types import FinishReason, GenerateRequest, UpdateMode

PROMPT = [10, 200, 33, 47, 5, 90, 121]
NEW = 6  # every family runs all of this: steps are what it costs
LONG = 1500  # more tokens than any engine samples before a test ends it

Weights = dict[str, torch.Tensor]


class MakeEngine(Protocol):
    def __call__(self, **overrides: Any) -> Engine: ...


def engine_maker(
    load: Callable[..., Engine], loop_scope: Literal["function", "module"] = "function"
) -> Any:
    """Return the fixture ``make_engine``: engines of one test, stopped after it."""

    @pytest_asyncio.fixture(loop_scope=loop_scope)
    async def make_engine(sparse: Path) -> AsyncIterator[MakeEngine]:
        made: list[Engine] = []

        def make(path: Path = sparse, **overrides: Any) -> Engine:
            made.append(load(path, **overrides))
            return made[-1]

        yield make
        for engine in made:
            await engine.stop()

    return make_engine


class Reference(Protocol):
    """The served model without an engine."""

    def teacher_force(self, tokens: list[int]) -> tuple[Ids, torch.Tensor]:
        """Return experts ``[tokens, moe_layers, top_k]`` and logprobs ``[tokens, vocab]``."""
        ...

    def decode(self, tokens: list[int]) -> str: ...

    def weights(self) -> Weights: ...


@dataclass(frozen=True)
class Sampled:
    """One rollout, put together from its chunks."""

    chunks: list[EngineChunk]

    @property
    def ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def logprobs(self) -> list[float]:
        return [logprob for chunk in self.chunks for logprob in chunk.logprobs]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason

    @property
    def record(self) -> Record | None:
        return self.chunks[-1].record


def varied(**fields: Any) -> GenerateRequest:
    """Sampled, yet always the same: some small models repeat themselves when greedy."""
    return request(**{"temperature": 1.0, "seed": 3, **fields})


def request(**fields: Any) -> GenerateRequest:
    """Greedy, recorded, `NEW` tokens, no EOS."""
    defaults: dict[str, Any] = {
        "input_ids": PROMPT,
        "max_new_tokens": NEW,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_routed_experts": True,
    }
    return GenerateRequest(**{**defaults, **fields})


async def sample(engine: Engine, wanted: GenerateRequest) -> Sampled:
    return await rest(engine.generate(wanted), [])


async def sample_group(engine: Engine, wanted: GenerateRequest, n: int) -> list[Sampled]:
    members: list[list[EngineChunk]] = [[] for _ in range(n)]
    async for index, chunk in engine.generate_group(wanted, n):
        members[index].append(chunk)
    assert all(chunks[-1].finish_reason is not None for chunks in members)
    return [Sampled(chunks) for chunks in members]


async def rest(generation: AsyncGenerator[EngineChunk, None], chunks: list[EngineChunk]) -> Sampled:
    chunks.extend([chunk async for chunk in generation])
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is not None
    return Sampled(chunks)


class Started:
    """A rollout that is known to run: its first token has come."""

    def __init__(self, engine: Engine, wanted: GenerateRequest) -> None:
        self.generation = engine.generate(wanted)
        self.chunks: list[EngineChunk] = []

    async def first(self) -> "Started":
        self.chunks.append(await anext(self.generation))
        return self

    async def rest(self) -> Sampled:
        return await rest(self.generation, self.chunks)


async def submitted(engine: Engine, wanted: GenerateRequest) -> "asyncio.Task[Sampled]":
    """Return a task whose request has reached the engine."""
    task = asyncio.create_task(sample(engine, wanted))
    await asyncio.sleep(0)  # not a delay: one turn of the loop, in which the task begins
    return task


def check_rows(record: Record | None, prompt: list[int], output: list[int], engine: Engine) -> None:
    """Assert P+G-1 rows, and the header that goes with them."""
    assert record is not None
    rows = len(prompt) + len(output) - 1
    assert record.ids.shape == (rows, engine.info.layers, engine.info.top_k)
    assert record.ids.dtype == np.uint8
    assert record.start == 0
    assert record.num_experts == engine.info.num_experts
    assert record.moe_layers == engine.info.moe_layers
    assert record.weight_version == engine.weight_version
    assert record.meta.token_hash == hash_tokens((prompt + output)[:rows])
    record.meta.verify(record.ids)


def agreement(record: Record | None, experts: Ids) -> float:
    """Return the share of (row, layer) whose experts are the same set."""
    assert record is not None
    recorded = np.sort(record.ids[:, list(record.moe_layers)], axis=-1)
    assert recorded.shape == experts.shape
    return float((recorded == np.sort(experts, axis=-1)).all(axis=-1).mean())


class EngineContract:
    """Rows, endings, text, sampling, aborts, weights and refusals."""

    # Smallest share of (row, layer) on which record and teacher forcing agree.
    min_agreement = 1.0
    # How far a log-probability may be from teacher forcing's.
    logprob_tolerance = 1e-4

    # Rows of the record.

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
        assert done.logprobs == plain.logprobs[:place]
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

    # Text.

    async def test_stop_string_cuts_text_but_no_ids(
        self, engine: Engine, reference: Reference
    ) -> None:
        plain = await sample(engine, varied(max_new_tokens=24))
        stop = visible_piece(plain.text, len(plain.text) // 3)
        done = await sample(engine, varied(max_new_tokens=24, stop=(stop,)))
        assert done.reason == "stop"
        assert done.text == plain.text[: plain.text.index(stop)]
        assert done.ids == plain.ids[: len(done.ids)]
        assert stop in reference.decode(done.ids)
        assert stop not in reference.decode(done.ids[:-1])
        check_rows(done.record, PROMPT, done.ids, engine)

    async def test_streamed_text_equals_the_final_decode(
        self, engine: Engine, reference: Reference
    ) -> None:
        wanted = [
            request(max_new_tokens=24, temperature=1.5, seed=seed, stop=("never to be found",))
            for seed in range(4)
        ]
        for done in await asyncio.gather(*(sample(engine, one) for one in wanted)):
            assert done.text == reference.decode(done.ids)

    # Sampling.

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
        assert first.logprobs == again.logprobs
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

    # Groups.

    async def test_a_group_samples_as_its_members_alone(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine(max_batch_size=4)
        wanted = request(temperature=1.0, seed=5)
        other = asyncio.create_task(sample(engine, request(max_new_tokens=15)))
        group = await sample_group(engine, wanted, 5)
        for index, done in enumerate(group):
            alone = await sample(engine, wanted.member(index))
            assert (done.ids, done.text, done.reason) == (alone.ids, alone.text, "length")
            check_rows(done.record, PROMPT, done.ids, engine)
            experts, _ = reference.teacher_force([*PROMPT, *done.ids][:-1])
            assert agreement(done.record, experts) >= self.min_agreement
        assert len({tuple(done.ids) for done in group}) > 1
        assert (await other).reason == "length"

    async def test_a_group_ends_as_a_whole_or_one_by_one(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2)
        wanted = request(request_id="g", max_new_tokens=LONG)
        group = engine.generate_group(wanted, 4)
        chunks = [await anext(group)]
        assert await engine.abort("g-1") == 1
        assert await engine.abort("g-3") == 1
        assert await engine.abort("g") == 2
        chunks += [chunk async for chunk in group]
        ends = [index for index, chunk in chunks if chunk.finish_reason == "abort"]
        assert sorted(ends) == [0, 1, 2, 3]
        closed = engine.generate_group(wanted, 4)
        await anext(closed)
        await closed.aclose()
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0

    async def test_a_group_that_can_never_run_is_refused(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2, max_waiting=1)
        with pytest.raises(InvalidRequest, match="1 to 3 rollouts, got 4"):
            await sample_group(engine, request(), 4)
        with pytest.raises(InvalidRequest, match="seed in "):
            await sample_group(engine, request(seed=2**64 - 2), 3)
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        with pytest.raises(EngineOverloaded, match="there are 1, and 3 came"):
            await sample_group(engine, request(), 3)
        await engine.abort()
        await run.rest()
        assert len(await sample_group(engine, request(), 3)) == 3

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

    # Aborts.

    async def test_abort_of_a_running_request_keeps_its_rows(self, engine: Engine) -> None:
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        assert await engine.abort("a") == 1
        done = await run.rest()
        assert done.reason == "abort"
        assert 1 <= len(done.ids) < LONG
        check_rows(done.record, PROMPT, done.ids, engine)

    async def test_abort_before_the_start_has_no_record(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        waiting = await submitted(engine, request(request_id="waits"))
        assert await engine.abort("waits") == 1
        done = await waiting
        assert (done.reason, done.ids, done.record) == ("abort", [], None)
        await run.generation.aclose()

    async def test_abort_frees_the_slot_at_once(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        waiting = await submitted(engine, request())
        assert await engine.abort("a") == 1
        assert (await waiting).reason == "length"
        assert (await run.rest()).reason == "abort"

    async def test_abort_all_ends_running_and_waiting(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=2)
        runs = [await Started(engine, request(max_new_tokens=LONG)).first() for _ in range(2)]
        waiting = [await submitted(engine, request()) for _ in range(3)]
        assert await engine.abort() == 5
        assert {(await run.rest()).reason for run in runs} == {"abort"}
        assert {(await task).reason for task in waiting} == {"abort"}
        assert await engine.abort() == 0

    async def test_abort_of_an_unknown_request_is_none(self, engine: Engine) -> None:
        assert await engine.abort("nobody") == 0

    async def test_closing_the_iterator_aborts(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        await run.generation.aclose()
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0

    async def test_cancelling_the_reader_aborts(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_batch_size=1)
        task = await submitted(engine, request(max_new_tokens=LONG))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await sample(engine, request())).reason == "length"
        assert await engine.abort() == 0

    async def test_a_storm_of_aborts_leaves_good_records_and_nothing_running(
        self, make_engine: MakeEngine, reference: Reference
    ) -> None:
        engine = make_engine(max_batch_size=4)
        fates = itertools.cycle(["finish", "abort", "close", "finish", "abort_early"])

        async def live(one: GenerateRequest, fate: str) -> Sampled | None:
            if fate == "abort_early":
                task = await submitted(engine, one)
                await engine.abort(one.request_id)
                return await task
            run = await Started(engine, one).first()
            if fate == "abort":
                await engine.abort(one.request_id)
            if fate == "close":
                await run.generation.aclose()
                return None
            return await run.rest()

        wanted = mixed_requests(20)
        done = await asyncio.gather(*map(live, wanted, fates))
        assert await engine.abort() == 0
        for one, rollout in zip(wanted, done, strict=True):
            if rollout is None:
                continue
            if not rollout.ids:
                assert (rollout.reason, rollout.record) == ("abort", None)
                continue
            check_rows(rollout.record, one.input_ids, rollout.ids, engine)
            experts, _ = reference.teacher_force([*one.input_ids, *rollout.ids][:-1])
            assert agreement(rollout.record, experts) >= self.min_agreement

    # The queue.

    async def test_a_full_queue_refuses_and_serves_what_it_took_in_order(
        self, make_engine: MakeEngine
    ) -> None:
        engine = make_engine(max_batch_size=1, max_waiting=2)
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        order: list[int] = []

        async def numbered(number: int) -> None:
            await sample(engine, request(max_new_tokens=2))
            order.append(number)

        tasks = [asyncio.create_task(numbered(number)) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloaded, match="2 wait"):
            await sample(engine, request())
        await engine.abort("a")
        await asyncio.gather(*tasks)
        assert order == [0, 1]
        assert (await run.rest()).reason == "abort"
        assert (await sample(engine, request())).reason == "length"

    async def test_an_id_in_use_is_refused(self, engine: Engine) -> None:
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        with pytest.raises(InvalidRequest, match="'a' is already in use"):
            await sample(engine, request(request_id="a"))
        assert await engine.abort("a") == 1
        assert (await run.rest()).reason == "abort"
        assert (await sample(engine, request(request_id="a"))).reason == "length"

    # Weights.

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
        update = asyncio.create_task(engine.update_weights(other, 7, mode))
        await asyncio.sleep(0)
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
        assert new.logprobs != plain.logprobs
        await engine.update_weights(reference.weights(), 8, mode)
        again = await sample(engine, request())
        assert again.ids == plain.ids[: len(again.ids)]

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

    # Sleep.

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
        assert (engine.weight_version, new.logprobs == before.logprobs) == (4, False)
        check_rows(new.record, PROMPT, new.ids, engine)
        await engine.sleep(1)
        await engine.wake()
        assert (engine.weight_version, (await sample(engine, request())).ids) == (4, new.ids)
        await engine.sleep(2)
        await engine.wake()
        assert (engine.weight_version, (await sample(engine, request())).ids) == (0, before.ids)

    # Refusals.

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"input_ids": [1, 100_000]}, r"input_ids in \[0, \d+\), got 100000"),
            ({"input_ids": [1, -1]}, r"input_ids in \[0, \d+\), got -1"),
            ({"input_ids": [5] * 2048}, "at most 2047 prompt tokens.* 2048, got 2048"),
            ({"logit_bias": {100_000: 1.0}}, r"logit_bias in \[0, \d+\), got 100000"),
            ({"stop_token_ids": (100_000,)}, r"stop_token_ids in \[0, \d+\), got 100000"),
            ({"stop": ("",)}, "stop strings that are not empty"),
            ({"seed": 2**64}, "seed in .*, got 18446744073709551616"),
        ],
    )
    async def test_a_bad_request_is_one_clear_error(
        self, engine: Engine, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=message):
            engine.check(request(**fields))
        with pytest.raises(InvalidRequest, match=message):
            await sample(engine, request(**fields))

    async def test_an_empty_prompt_is_refused(self, engine: Engine) -> None:
        empty = request().model_copy(update={"input_ids": []})
        with pytest.raises(InvalidRequest, match="at least one prompt token"):
            engine.check(empty)

    async def test_the_context_length_ends_a_generation(self, make_engine: MakeEngine) -> None:
        engine = make_engine(context_length=16)
        assert engine.info.context_length == 16
        done = await sample(engine, request(max_new_tokens=100))
        assert (done.reason, len(done.ids)) == ("length", 16 - len(PROMPT))
        check_rows(done.record, PROMPT, done.ids, engine)
        full = await sample(engine, request(input_ids=[5] * 15))
        assert (full.reason, len(full.ids)) == ("length", 1)
        with pytest.raises(InvalidRequest, match="at most 15 prompt tokens"):
            engine.check(request(input_ids=[5] * 16))

    # The end.

    async def test_stop_ends_everything_and_leaves_nothing(self, make_engine: MakeEngine) -> None:
        tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
        engine = make_engine(max_batch_size=1)
        engine.check_health()
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        waiting = await submitted(engine, request())
        await engine.stop()
        done = await run.rest()
        assert done.reason == "abort"
        check_rows(done.record, PROMPT, done.ids, engine)
        assert (await waiting).reason == "abort"
        await engine.stop()
        with pytest.raises(EngineUnavailable, match="stopped"):
            engine.check_health()
        with pytest.raises(EngineUnavailable, match="stopped"):
            await sample(engine, request())
        assert await engine.abort() == 0
        assert asyncio.all_tasks() == tasks
        assert set(threading.enumerate()) <= threads


def first_new_token(ids: list[int]) -> tuple[int, int]:
    """Return a token, not the first, that has not been there before, and its place."""
    return next((t, i) for i, t in enumerate(ids) if i > 1 and t not in ids[:i])


def visible_piece(text: str, start: int) -> str:
    """Return a character of the text that is no replacement character."""
    return next(char for char in text[start:] if char != "\N{REPLACEMENT CHARACTER}")


def mixed_requests(count: int) -> list[GenerateRequest]:
    """Greedy requests of many lengths, more than there are slots."""
    return [
        request(
            input_ids=[(7 * i + 11 * j) % 250 + 3 for j in range(1 + 5 * i % 37)],
            max_new_tokens=2 + i % 5 * 3,
        )
        for i in range(count)
    ]
