"""Rows that were never a choice of experts: found, counted, refused, named."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.assemble.joining import joined
from serve_app.errors import RecordError
from serve_app.records import Record, make_record, part_of
from serve_app.records.distinct import repeating_rows, repeating_rows_of_ours
from serve_app.wire.payloads.expected import Expected
from tests.distinct_ids import distinct_ids

SHAPE = (40, 5, 4)


@given(
    rows=st.integers(1, 5),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 9),
    experts=st.sampled_from([9, 12, 300]),
    seed=st.integers(0, 2**32 - 1),
)
def test_repetitions_are_those_that_a_set_would_find(
    rows: int, layers: int, top_k: int, experts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, (rows, layers, top_k)).astype(np.uint16)
    moe = sorted(rng.permutation(layers)[: rng.integers(1, layers + 1)].tolist())
    wanted = [any(len(set(ids[row, layer])) < top_k for layer in moe) for row in range(rows)]
    assert repeating_rows(ids, moe).tolist() == wanted


def test_a_long_record_is_looked_at_in_pieces() -> None:
    ids = distinct_ids((30_000, 4, 2), 64).astype(np.uint8)
    bad = [0, 16_383, 16_384, 29_999]
    ids[bad, 2] = 7
    assert np.flatnonzero(repeating_rows(ids, range(4))).tolist() == bad


@pytest.mark.parametrize("fill", [0, 3])
def test_a_row_that_repeats_is_invalid_and_counted(fill: int) -> None:
    ids = distinct_ids(SHAPE, 16)
    ids[7] = fill
    ids[9, 4, 1] = ids[9, 4, 0]
    record = make_record(ids, num_experts=16)
    assert (record.meta.invalid, record.meta.unrouted) == ((7, 9), 2)
    assert np.flatnonzero(~record.valid).tolist() == [7, 9]
    given = np.ones(SHAPE[0], np.bool_)
    given[[3, 7]] = False
    marked = make_record(ids, num_experts=16, valid=given)
    assert (marked.meta.invalid, marked.meta.unrouted) == ((3, 7, 9), 1)


def mixed(rows: int = 6) -> Record:
    """Row 1 was put as not valid, row 4 repeats an expert."""
    ids = distinct_ids((rows, 2, 2), 16)
    ids[4] = 3
    valid = np.ones(rows, np.bool_)
    valid[1] = False
    return make_record(ids, num_experts=16, valid=valid)


def test_a_part_has_what_is_said_of_its_own_rows() -> None:
    record = mixed()
    first, second = part_of(record, 0, 3), part_of(record, 3, 6)
    assert (first.meta.invalid, first.meta.unrouted_rows) == ((1,), ())
    assert (second.meta.invalid, second.meta.unrouted_rows) == ((1,), (1,))
    assert (record.first(4).meta.unrouted, record.first(5).meta.unrouted_rows) == (0, (4,))


def test_a_chain_joined_has_what_is_said_of_the_rows_that_are_read() -> None:
    parent, child = mixed(), make_record(distinct_ids((6, 2, 2), 16), num_experts=16, start=3)
    whole = joined([parent, child])
    assert (whole.meta.invalid, whole.meta.unrouted_rows) == ((1, 4), (4,))
    assert joined([parent.first(4), child]).meta.unrouted == 0
    with pytest.raises(RecordError, match="got 1 rows that repeat one"):
        Expected(2, 2, 16, repeats="refuse").check(whole)


def test_a_dense_layers_columns_mean_nothing() -> None:
    ids = distinct_ids(SHAPE, 16)
    ids[:, 1] = 5
    assert make_record(ids, num_experts=16, moe_layers=(0, 2, 3, 4)).meta.invalid == ()
    with pytest.raises(RecordError, match="a repeated expert in every row"):
        make_record(ids, num_experts=16)


def test_refusing_says_where() -> None:
    ids = distinct_ids(SHAPE, 16)
    ids[7:9] = 0
    with pytest.raises(RecordError, match="got 2 rows that repeat one, the first at position 107"):
        make_record(ids, num_experts=16, start=100, repeats="refuse")


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (0, np.int64, "expected routes, got all zeros: none of 40 rows has 4 different experts"),
        (5, np.uint8, "expected routes, got all 5"),
        (-1, np.int32, r"in \[0, 16\), got -1, all -1"),
        (65535, np.uint16, r"in \[0, 16\), got 65535, all 65535"),
    ],
)
def test_an_array_without_one_real_row_is_named(value: int, dtype: Any, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        make_record(np.full(SHAPE, value, dtype), num_experts=16)


def test_one_slot_cannot_repeat() -> None:
    assert make_record(np.zeros((3, 2, 1), int), num_experts=4).meta.invalid == ()


def test_what_an_engine_of_ours_misses_is_found() -> None:
    """It writes whole rows, and a layer that it does not capture is missing in all of them."""
    rows, layers, _ = SHAPE
    for row, layer in itertools.product((0, 13, rows - 1), (None, 0, 2, layers - 1)):
        ids = distinct_ids(SHAPE, 16).astype(np.uint8)
        if layer is None:
            ids[row] = 0
            wanted = [row]
        else:
            ids[:, layer] = 0
            wanted = list(range(rows))
        found = repeating_rows_of_ours(ids, range(layers))
        assert np.flatnonzero(found).tolist() == wanted
    assert not repeating_rows_of_ours(distinct_ids(SHAPE, 16), range(layers)).any()
