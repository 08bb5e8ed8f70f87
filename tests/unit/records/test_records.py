"""Records: what is accepted, how it is narrowed, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import RecordError
from serve_app.records import hash_tokens, make_record, narrowest_dtype
from tests.distinct_ids import distinct_ids


@pytest.mark.parametrize(
    ("experts", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_535, "uint16")]
)
def test_the_narrowest_dtype_that_holds_every_id(experts: int, dtype: str) -> None:
    assert narrowest_dtype(experts) == dtype
    made = make_record(np.full((1, 1, 1), experts - 1), num_experts=experts)
    assert made.ids.dtype == dtype
    assert made.ids[0, 0, 0] == experts - 1


@given(
    rows=st.integers(1, 9),
    layers=st.integers(1, 5),
    top_k=st.integers(1, 4),
    experts=st.sampled_from([4, 255, 256, 257, 65_535]),
    source=st.sampled_from(["int64", "int32", "uint16", "uint32"]),
    seed=st.integers(0, 9),
)
def test_ids_survive_narrowing(
    rows: int, layers: int, top_k: int, experts: int, source: str, seed: int
) -> None:
    ids = distinct_ids((rows, layers, top_k), experts, seed).astype(source)
    made = make_record(ids, num_experts=experts, start=seed)
    np.testing.assert_array_equal(made.ids, ids)
    assert (made.meta.rows, made.meta.layers, made.meta.top_k) == ids.shape
    assert made.meta.nbytes == made.ids.nbytes
    assert made.meta.stop == seed + rows
    made.meta.verify(made.ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((2, 3))}, r"\[rows, layers, top_k\]"),
        ({"ids": np.zeros((0, 3, 2), int)}, r"\[rows, layers, top_k\]"),
        ({"ids": np.zeros((2, 3, 2))}, "integers, got float64"),
        ({"ids": np.full((2, 3, 2), 8)}, r"\[0, 8\), got 8"),
        ({"ids": np.full((2, 3, 2), -1)}, "got -1"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 65_536}, "num_experts"),
        ({"num_experts": 1}, "top_k 2"),
        ({"start": -1}, "start"),
        ({"moe_layers": ()}, "moe_layers"),
        ({"moe_layers": (1, 0)}, "moe_layers"),
        ({"moe_layers": (0, 3)}, "moe_layers"),
        ({"tokens": [1]}, "2 rows need 2 token ids, got 1"),
        ({"valid": np.ones(3, bool)}, r"valid must be \[2\]"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"ids": distinct_ids((2, 3, 2), 8), "num_experts": 8} | change
    with pytest.raises(RecordError, match=message):
        make_record(**arguments)


def test_dense_layers_columns_mean_nothing_and_are_cleared() -> None:
    ids = np.full((2, 3, 2), 65_535)
    ids[:, [0, 2]] = 7, 3
    made = make_record(ids, num_experts=8, moe_layers=(0, 2))
    assert made.moe_layers == (0, 2)
    assert made.ids[:, 1].max() == 0
    assert (made.ids[:, [0, 2]] == [7, 3]).all()


def test_valid_rows_and_token_hash_are_kept() -> None:
    made = make_record(
        np.zeros((3, 1, 1), int),
        num_experts=2,
        tokens=[5, 6, 7],
        valid=np.array([True, False, True]),
    )
    assert made.valid.tolist() == [True, False, True]
    assert made.meta.token_hash == hash_tokens([5, 6, 7]) != hash_tokens([5, 6, 8])


def test_altered_bytes_and_shapes_do_not_verify() -> None:
    made = make_record(np.zeros((3, 2, 1), int), num_experts=2)
    altered = made.ids.copy()
    altered[1, 1, 0] = 1
    with pytest.raises(RecordError, match="checksum"):
        made.meta.verify(altered)
    with pytest.raises(RecordError, match="promises"):
        made.meta.verify(made.ids[:2])


def test_layers_become_plain_integers() -> None:
    """Of numpy's, JSON knows nothing, and one tuple stands for all that are equal."""
    ids = np.zeros((2, 9, 1), np.uint8)
    numpys: Any = np.array([2, 7])
    fractions: Any = [0.5]
    made = make_record(ids, num_experts=4, moe_layers=numpys)
    assert [type(layer) for layer in made.moe_layers] == [int, int]
    assert make_record(ids, num_experts=4, moe_layers=[2, 7]).moe_layers is made.moe_layers
    with pytest.raises(RecordError, match=r"must be integers, got \[0\.5\]"):
        make_record(ids, num_experts=4, moe_layers=fractions)
