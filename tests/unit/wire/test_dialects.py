"""What engines and trainers write, byte for byte."""

import base64

import numpy as np
import pytest

from serve_app.errors import RecordError
from serve_app.records import make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import decode, encode
from tests.distinct_ids import distinct_ids
from tests.unit.wire.samples import FULL, IDS, MODEL, npy, routes


def test_a_text_without_shape_is_all_layers_unless_the_rows_are_known() -> None:
    six_by_two = make_record(distinct_ids((6, 2, 2), 16), num_experts=16)
    payload = encode(six_by_two, "sglang")
    assert decode(payload, FULL).meta.rows == 4
    with pytest.raises(RecordError, match="in dense layer 0"):
        decode(payload, MODEL)
    assert decode(payload, Expected(3, 2, 16, (1, 2), rows=6)).meta.rows == 6
    with pytest.raises(RecordError, match=r"int32\[5, 3, 2\]"):
        decode(payload, Expected(3, 2, 16, (1, 2), rows=5))


def test_nemo_rl_rows_of_minus_one_and_damaged_rows() -> None:
    ids = routes().ids.astype(np.int16)
    ids[1] = -1
    text = f"nrlre1:int16:4x3x2:{base64.b64encode(ids.tobytes()).decode()}"
    assert decode(text, MODEL).valid.tolist() == [True, False, True, True]
    ids[2, 2, 0] = -1
    text = f"nrlre1:int16:4x3x2:{base64.b64encode(ids.tobytes()).decode()}"
    with pytest.raises(RecordError, match="got row 2 with both"):
        decode(text, MODEL)


def test_what_engines_write_byte_for_byte() -> None:
    expected = Expected(1, 2, 16)
    for payload in (
        "AQAAAAIAAAA=",  # SGLang's int32
        {"routed_experts": "AQI=", "routed_experts_dtype": "uint8", "id": "meta_info has more"},
        {"routed_experts": "AQAAAAIAAAA="},
        npy(np.array([[[1, 2]]], np.uint8)),
        npy(np.asfortranarray([[[1, 2]]]).astype(">i4")),
        {"data": "AQI=", "shape": [1, 1, 2], "start": 0},  # prime-rl before it said the dtype
        {"data": "AQACAA==", "shape": [1, 1, 2], "start": 0, "dtype": "uint16"},
        {"data": "AQACAA==", "shape": [1, 1, 2], "dtype": "int16"},
        "nrlre1:int16:1x1x2:AQACAA==",
        [[[1, 2]]],
    ):
        assert decode(payload, expected).ids.tolist() == [[[1, 2]]]


def test_a_fortran_ordered_npy_keeps_its_rows() -> None:
    np.testing.assert_array_equal(decode(npy(np.asfortranarray(IDS)), FULL).ids, IDS)
