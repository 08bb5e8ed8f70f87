"""Rows that were never a choice of experts are told from those that were, in every format."""

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from serve_app.errors import RecordError
from serve_app.records import Record, checksum, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FormatName, decode, encode
from tests.unit.wire.samples import FULL, IDS, MODEL, NAMES, npy, routes

CARRY_NATIVE: tuple[FormatName, ...] = (
    "array",
    "lmdeploy",
    "sglang",
    "prime_rl",
    "skyrl",
    "xtuner",
)


def written(ids: npt.NDArray[Any], name: FormatName) -> Any:
    """Return what a peer writes that does not look at its ids."""
    moe = (1, 2) if not ids[:, 0].any() else (0, 1, 2)
    record = make_record(np.tile(np.arange(2), (len(ids), 3, 1)), num_experts=16, moe_layers=moe)
    meta = record.meta._replace(checksum=checksum(ids))
    return encode(Record(meta, ids), name)


def with_repeats(row: int) -> npt.NDArray[Any]:
    ids = routes().ids.copy()
    ids[row, 2] = 7
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_repeats_an_expert_is_masked_and_counted(name: FormatName) -> None:
    found = decode(written(with_repeats(1), name), MODEL, allow_pickle=True)
    assert found.valid.tolist() == [True, False, True, True]
    assert found.meta.unrouted == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_repeats_an_expert_is_refused_where_all_rows_are_promised(
    name: FormatName,
) -> None:
    promised = Expected(3, 2, 16, (1, 2), repeats="refuse")
    with pytest.raises(RecordError, match="2 different experts in each MoE layer of every row"):
        decode(written(with_repeats(1), name), promised, allow_pickle=True)
    assert decode(encode(routes(), name), promised, allow_pickle=True).meta.rows == 4


def test_a_record_read_by_key_is_held_to_the_promise_after_the_cut() -> None:
    record = make_record(with_repeats(3), num_experts=16, moe_layers=(1, 2))
    assert MODEL.check(record).meta.unrouted == 1
    with pytest.raises(RecordError, match="got 1 rows that repeat one"):
        Expected(3, 2, 16, (1, 2), repeats="refuse").check(record)
    cut = Expected(3, 2, 16, (1, 2), repeats="refuse", extra_rows=1).check(record)
    assert cut.meta.unrouted == 0
    with pytest.raises(RecordError, match="repeats as 'mask' or 'refuse', got 'ours'"):
        Expected(3, 2, 16, repeats="ours")  # type: ignore[arg-type]


def test_repetitions_in_dense_layers_mean_nothing() -> None:
    ids = routes().ids.astype(np.uint16)
    ids[:, 0] = 65_535
    assert not decode(ids, Expected(3, 2, 16, (1, 2), repeats="refuse")).meta.invalid


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_of_zeros_is_one_error(name: FormatName) -> None:
    with pytest.raises(RecordError, match="expected routes, got all zeros: none of 4 rows"):
        decode(written(np.zeros((4, 3, 2), np.uint8), name), MODEL, allow_pickle=True)


def carried(ids: npt.NDArray[Any], name: FormatName) -> Any:
    """Return ids in a format whose writer takes the dtype from them."""
    if name == "skyrl":
        fields = encode(make_record(IDS, num_experts=300), name)
        return {**fields, "data": base64.b64encode(ids.astype("<i2").tobytes()).decode()}
    return written(ids, name)


@pytest.mark.parametrize("name", CARRY_NATIVE)
def test_a_row_of_minus_one_routes_natively_in_every_format_that_can_hold_it(
    name: FormatName,
) -> None:
    ids = IDS.astype(np.int16)
    ids[2] = -1
    found = decode(carried(ids, name), FULL, allow_pickle=True)
    assert found.valid.tolist() == [True, True, False, True]
    assert found.meta.unrouted == 0
    ids[2, 0, 0] = 3
    with pytest.raises(RecordError, match="a row of ids or a row of -1, got row 2 with both"):
        decode(carried(ids, name), FULL, allow_pickle=True)
    ids[:] = -1
    with pytest.raises(RecordError, match="got all -1: none of 4 rows was routed"):
        decode(carried(ids, name), FULL, allow_pickle=True)


def test_a_row_of_minus_one_may_have_a_dense_layer_as_engines_leave_it() -> None:
    ids = routes().ids.astype(np.int32)
    ids[1, 1:] = -1
    assert decode(ids, MODEL).valid.tolist() == [True, False, True, True]


def test_an_answer_of_minus_one_of_nemo_rl_is_one_error_with_and_without_its_dummy() -> None:
    ids = np.full((4, 2, 2), -1, np.int8)
    record = routes(4, valid=np.array([True, False, False, False]))
    nothing = Record(record.meta._replace(invalid=(0, 1, 2, 3)), record.ids)
    with pytest.raises(RecordError, match="got all -1: none of 4 rows was routed"):
        decode(encode(nothing, "nemo_rl"), MODEL)
    bare = f"nrlre1:int8:4x2x2:{base64.b64encode(ids.tobytes()).decode()}"
    with pytest.raises(RecordError, match="got all -1: none of 4 rows was routed"):
        decode(bare, MODEL)
    with pytest.raises(RecordError, match="got all -1"):
        decode(ids, MODEL)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_a_buffer_that_nobody_wrote_is_one_error(dtype: str) -> None:
    ids = np.full((4, 3, 2), 65_535, dtype)
    with pytest.raises(RecordError, match=r"in \[0, 16\), got 65535, all 65535"):
        decode(ids, FULL)
    with pytest.raises(RecordError, match="got 65535, all 65535"):
        decode(npy(ids), FULL)
    with pytest.raises(RecordError, match="got all 255: none of 4 rows"):
        decode(np.full((4, 3, 2), 255, np.uint8), Expected(3, 2, 256))
