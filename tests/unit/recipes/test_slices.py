"""Rows of each trainer and mode in docs/trainers.md, beside the trainer's own rule."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.recipes import slices
from examples.recipes.slices import Place
from serve_app.config import StoreArgs
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, RankSlice, RoutedSequence
from tests.distinct_ids import distinct_ids
from tests.unit.recipes import rules
from tests.unit.recipes.rules import Given, Got, Rows

EXPERTS, LAYERS, TOP_K = 64, 2, 3
MOST = 40
FULL = 256
"""A pack that holds any batch here, and divides by whatever splits it."""

STORE = MemoryStore("recipes", StoreArgs(backend="memory"))


class Case(NamedTuple):
    """One row of the table: our slice, the trainer's rule, and where it applies."""

    trainer: str
    mode: str
    ours: Callable[[Place, list[int]], RankSlice]
    rule: Callable[[Given, Place], Got]
    where: Callable[[Place], bool] = lambda place: place.sequence_parallel
    layout: Any = "packed"


def with_sp_off(place: Place) -> bool:
    return not place.sequence_parallel


def anywhere(place: Place) -> bool:
    return True


CASES = [
    Case("verl", "bf16", lambda p, n: slices.verl(p), rules.verl),
    Case("verl", "dynamic context parallelism", lambda p, n: slices.verl(p), rules.verl),
    Case("verl", "FP8", lambda p, n: slices.verl(p, fp8=True), rules.verl_fp8),
    Case(
        "verl", "length buckets",
        lambda p, n: slices.verl(p, bucket=96), lambda g, p: rules.verl_buckets(g, p, 96),
    ),
    Case(
        "verl", "contiguous (DeepSeek-V4)",
        lambda p, n: slices.verl_contiguous(p, n, 16),
        lambda g, p: rules.verl_contiguous(g, p, 16),
    ),
    Case(
        "slime, miles", "cp = 1",
        lambda p, n: slices.slime(p, 8), lambda g, p: rules.slime(g, p, 8),
        lambda p: p.cp_size == 1 and p.sequence_parallel,
    ),
    Case(
        "slime, miles", "cp > 1",
        lambda p, n: slices.slime(p, 8), lambda g, p: rules.slime(g, p, 8),
        lambda p: p.cp_size > 1 and p.sequence_parallel,
    ),
    Case(
        "slime, miles", "allgather_cp",
        lambda p, n: slices.slime(p, 8, allgather_cp=True),
        lambda g, p: rules.slime_allgather(g, p, 8),
    ),
    Case(
        "slime, miles", "sequence parallelism off",
        lambda p, n: slices.slime(p, 8), lambda g, p: rules.slime(g, p, 8), with_sp_off,
    ),
    Case("SkyRL", "bf16", lambda p, n: slices.skyrl(p), lambda g, p: rules.skyrl(g, p, False)),
    Case(
        "SkyRL", "FP8",
        lambda p, n: slices.skyrl(p, fp8=True), lambda g, p: rules.skyrl(g, p, True),
    ),
    Case(
        "SkyRL", "packed_segment_layout",
        lambda p, n: slices.skyrl_once(p), lambda g, p: rules.skyrl_once(g, p, 1), anywhere,
    ),
    Case(
        "SkyRL", "packed_segment_layout, FP8",
        lambda p, n: slices.skyrl_once(p, tokens=32 * p.tp_size * p.cp_size),
        lambda g, p: rules.skyrl_once(g, p, 32 * p.tp_size * p.cp_size),
    ),
    Case(
        "NeMo-RL", "packed",
        lambda p, n: slices.nemo_rl(p), lambda g, p: rules.nemo_rl(g, p, 1, None), anywhere,
    ),
    Case(
        "NeMo-RL", "FP8, HybridEP",
        lambda p, n: slices.nemo_rl(p, divisor=16), lambda g, p: rules.nemo_rl(g, p, 16, None),
        anywhere,
    ),
    Case(
        "NeMo-RL", "pipeline stages",
        lambda p, n: slices.nemo_rl(p, packed_to=FULL),
        lambda g, p: rules.nemo_rl(g, p, 1, FULL), anywhere,
    ),
    Case(
        "Megatron", "zigzag over the whole buffer",
        lambda p, n: slices.megatron_buffer(p, FULL),
        lambda g, p: rules.whole_buffer(g, p, FULL), anywhere,
    ),
    Case(
        "Megatron", "hybrid context parallelism",
        lambda p, n: slices.megatron_buffer(p, -(-sum(n) // 16) * 16),
        lambda g, p: rules.whole_buffer(g, p, -(-sum(map(len, g)) // 16) * 16), anywhere,
    ),
    Case(
        "Megatron", "fixed length (bshd)",
        lambda p, n: slices.fixed_length(p, MOST + 8),
        lambda g, p: rules.fixed_length(g, p, MOST + 8), anywhere, "padded",
    ),
    Case(
        "xtuner", "packs",
        lambda p, n: slices.xtuner(p, FULL), lambda g, p: rules.packed_to(g, p, FULL),
        lambda p: p.cp_size == 1,
    ),
    Case(
        "prime-rl", "packs",
        lambda p, n: slices.prime_rl(p, 12 * p.cp_size),
        lambda g, p: rules.prime_rl(g, p, 12 * p.cp_size),
        lambda p: p.tp_size == 1,
    ),
]  # fmt: skip


def places(case: Case) -> Iterator[Place]:
    for cp, tp, split in product((1, 2, 4), (1, 2), (True, False)):
        for cp_rank, tp_rank in product(range(cp), range(tp)):
            if case.where(place := Place(cp, cp_rank, tp, tp_rank, split)):
                yield place


@cache
def stored(index: int, tokens: int) -> tuple[str, Rows]:
    """Put all rows but the last of an ``index``-th sequence of this length; its key and rows."""
    ids = distinct_ids((tokens, LAYERS, TOP_K), EXPERTS, 100 * index + tokens)
    return STORE.put(make_record(ids[:-1], num_experts=EXPERTS)), ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.trainer}: {case.mode}")
@given(lengths=st.lists(st.integers(2, MOST), min_size=1, max_size=5), data=st.data())
def test_every_rank_has_the_rows_that_its_trainer_gives_it(
    case: Case, lengths: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.sampled_from([*places(case)]))
    found = [stored(index, tokens) for index, tokens in enumerate(lengths)]
    sequences = [RoutedSequence(key, len(ids)) for key, ids in found]
    truth = np.concatenate([ids for _, ids in found])
    stops = np.cumsum(lengths)
    captured = np.isin(np.arange(len(truth)), stops - 1, invert=True)
    rank = case.ours(place, lengths)
    batch = materialize(STORE, sequences, BatchSpec(layout=case.layout, rank=rank))
    rows, ends = case.rule(np.split(np.arange(len(truth)), stops[:-1]), place)
    real = (rows != rules.PAD) & captured[rows]
    np.testing.assert_array_equal(batch.valid.reshape(-1), real)
    ids = batch.ids.reshape(-1, LAYERS, TOP_K)
    np.testing.assert_array_equal(ids[real], truth[rows[real]])
    if ends is not None:
        assert batch.cu_seqlens.tolist() == ends
