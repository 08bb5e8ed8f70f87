"""Ids of padding: distinct, another order a layer, and every share of the experts gets its part."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.assemble.padding import Padding
from serve_app.config import StoreArgs
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, RankSlice, RoutedSequence

Ids = np.ndarray[Any, Any]
SHARES = 8
DEALT: list[Any] = ["spread", "random"]


def padded(
    rows: int, experts: int, top_k: int, pad: Any = "spread", *, layers: int = 3, at: int = 0,
    seed: int = 0, dtype: Any = np.int64,
) -> Ids:  # fmt: skip
    """Rows of padding, ``[rows, layers, top_k]``."""
    ids, valid = np.full((rows, layers, top_k), 77).astype(dtype), np.ones(rows, bool)
    Padding(BatchSpec(pad=pad, pad_seed=seed), experts, range(layers)).fill(ids, valid, at)
    assert not valid.any()
    return ids


def most_uneven(ids: Ids, experts: int, shares: int = SHARES) -> float:
    """By how many rows the share that is farthest from even is off, in any layer."""
    worst = 0.0
    for layer in range(ids.shape[1]):
        share = ids[:, layer].ravel().astype(np.int64) * shares // experts
        counted = np.bincount(share, minlength=shares)
        worst = max(worst, float(np.abs(counted - ids[:, layer].size / shares).max()))
    return worst / float(ids.shape[2])


@given(
    pad=st.sampled_from(DEALT),
    experts=st.sampled_from([8, 16, 64, 128, 160, 256, 264, 384, 512, 1024]),
    top_k=st.integers(1, 10),
    rows=st.integers(1, 200),
    at=st.integers(-300, 300),
    seed=st.integers(0, 2**63),
)
def test_any_stretch_is_even_over_eight_shares(
    pad: Any, experts: int, top_k: int, rows: int, at: int, seed: int
) -> None:
    top_k = min(top_k, experts)
    ids = padded(rows, experts, top_k, pad, at=at, seed=seed)
    assert 0 <= ids.min() <= ids.max() < experts
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
    assert most_uneven(ids, experts) <= 1
    again = [padded(1, experts, top_k, pad, at=at + row, seed=seed) for row in range(rows)]
    np.testing.assert_array_equal(ids, np.concatenate(again))


@pytest.mark.parametrize("pad", DEALT)
@pytest.mark.parametrize("shares", [2, 4, 8, 16, 32, 64])
def test_a_long_tail_is_even_over_any_group(pad: Any, shares: int) -> None:
    ids = padded(5_001, 128, 8, pad, layers=48, dtype=np.uint8)
    assert most_uneven(ids, 128, shares) <= 1
    assert most_uneven(ids[:5_000], 128, 128) <= 1


@pytest.mark.parametrize("pad", DEALT)
@pytest.mark.parametrize(
    ("experts", "top_k", "shares"), [(60, 4, 5), (384, 8, 48), (160, 6, 20), (72, 8, 6)]
)
def test_shares_that_are_no_power_of_two(pad: Any, experts: int, top_k: int, shares: int) -> None:
    ids = padded(100, experts, top_k, pad, layers=48)
    assert max(most_uneven(ids[:rows], experts, shares) for rows in range(1, 101)) <= 1


@pytest.mark.parametrize("pad", DEALT)
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (512, 10), (60, 4), (257, 3)])
def test_every_layer_has_another_order(pad: Any, experts: int, top_k: int) -> None:
    ids = padded(9, experts, top_k, pad, layers=94)
    assert len({ids[:, layer].tobytes() for layer in range(94)}) == 94


@pytest.mark.parametrize("pad", DEALT)
@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (2, 2), (4, 4), (8, 8), (7, 7), (5, 3), (6, 4), (65_535, 2)]
)
def test_small_and_odd_models(pad: Any, experts: int, top_k: int) -> None:
    ids = padded(20, experts, top_k, pad)
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
    assert 0 <= ids.min() <= ids.max() < experts
    narrow = padded(20, experts, top_k, pad, dtype=np.uint16)
    np.testing.assert_array_equal(narrow, ids)


def test_spread_goes_on_where_the_seed_says_that_another_batch_stopped() -> None:
    whole = padded(30, 64, 6)
    parts = [padded(12, 64, 6), padded(18, 64, 6, seed=12)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_random_draws_its_orders_from_the_seed_and_spread_does_not() -> None:
    orders = {padded(16, 128, 8, "random", seed=seed).tobytes() for seed in range(20)}
    assert len(orders) == 20
    assert padded(16, 128, 8, seed=16).tobytes() == padded(16, 128, 8).tobytes()


def test_with_repetition_a_row_may_have_an_expert_twice() -> None:
    ids = padded(2_000, 128, 8, "random_with_repetition", seed=1)
    repeats = (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any(-1)
    assert 0.15 < repeats.mean() < 0.25  # 1 - 128! / 120! / 128**8 = 0.2
    assert abs(np.bincount(ids.ravel(), minlength=128) - 375).max() < 100
    later = padded(1_000, 128, 8, "random_with_repetition", seed=1, at=1_000)
    np.testing.assert_array_equal(ids[1_000:], later)


def stored(lengths: list[int], experts: int, top_k: int) -> tuple[MemoryStore, list[str]]:
    """Put a sequence of each length, whose last row was not captured."""
    store, keys = MemoryStore("pad", StoreArgs(backend="memory")), []
    for length in lengths:
        ids = np.tile(np.arange(top_k), (length - 1, 3, 1))
        keys.append(store.put(make_record(ids, num_experts=experts)))
    return store, keys


@pytest.mark.parametrize("pad", DEALT)
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (64, 6), (128, 1), (32, 4)])
@pytest.mark.parametrize(
    ("rank", "last_row"),
    [
        (RankSlice(), 1),  # only the row that was never captured
        (RankSlice(seq_multiple=16), 0),  # only alignment, one row a sequence
        (RankSlice(seq_multiple=16), 1),  # both
        (RankSlice(seq_multiple=24, total_multiple=4_096, tail="last_sequence"), 1),
        (RankSlice(seq_multiple=16, total_multiple=5_000), 0),
        (RankSlice(seq_multiple=16, total_multiple=5_000), 1),
    ],
)
def test_the_padding_of_a_batch_is_even(
    pad: Any, experts: int, top_k: int, rank: RankSlice, last_row: int
) -> None:
    """Sequences of 15 rows: as positions count, one pad row each is always the same experts."""
    store, keys = stored([16 if not last_row else 15] * 21, experts, top_k)
    sequences = [RoutedSequence(key, 15) for key in keys]
    batch = materialize(store, sequences, BatchSpec("int64", rank=rank, pad=pad))
    padding = batch.ids[~batch.valid]
    assert len(padding) >= 21
    assert most_uneven(padding, experts) <= 1
    for shares in (2, 4, 16):
        assert most_uneven(padding, experts, shares) <= 1


@pytest.mark.parametrize("style", ["zigzag", "contiguous", "zigzag_buffer"])
def test_ranks_have_their_part_of_the_whole_paddings_ids(style: Any) -> None:
    lengths = [15, 9, 33]
    store, keys = stored(lengths, 64, 6)
    sequences = [RoutedSequence(key, n) for key, n in zip(keys, lengths, strict=True)]
    ranks = [
        RankSlice(8, 64, "own_sequence", 2, cp, style, 2, sp)
        for cp, sp in itertools.product(range(2), range(2))
    ]
    parts = [materialize(store, sequences, BatchSpec(pad="random", rank=rank)) for rank in ranks]
    whole = materialize(store, sequences, BatchSpec(pad="random", rank=RankSlice(8, 64)))
    there = sorted(row.tobytes() for part in parts for row in part.ids[~part.valid])
    assert there == sorted(row.tobytes() for row in whole.ids[~whole.valid])
    assert most_uneven(whole.ids[~whole.valid], 64) <= 1
