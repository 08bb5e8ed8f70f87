"""A payload without one row says so, in every format."""

import base64
import pickle
from typing import Any

import numpy as np
import pytest

from serve_app.errors import RecordError
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FORMATS, FormatName, decode
from tests.unit.wire.samples import FULL, IDS, npy

NONE = {"data": "", "shape": [0, 3, 2], "dtype": "uint8"}


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("lmdeploy", []),
        ("array", IDS[:0]),
        ("array", np.empty(0)),
        ("sglang", ""),
        ("sglang_tagged", {"routed_experts": ""}),
        ("vllm", npy(IDS[:0])),
        ("prime_rl", {**NONE, "start": 7}),
        ("nemo_rl", "nrlre1:int8:0x3x2:"),
        ("skyrl", NONE),
        ("xtuner", base64.b64encode(pickle.dumps(IDS[:0], protocol=5)).decode()),
    ],
)
def test_no_rows_are_said_to_be_none(name: FormatName, payload: Any) -> None:
    for told in (FULL, Expected(3, 2, 16, rows=4)):
        for said in (None, name):
            with pytest.raises(RecordError, match="expected routes, got no rows"):
                decode(payload, told, format=said, allow_pickle=True)


def test_an_empty_payload_has_no_rows_whatever_its_format_should_be() -> None:
    nothing: tuple[Any, ...] = ("", [])
    for name in FORMATS:
        for payload in nothing:
            with pytest.raises(RecordError, match="got no rows"):
                decode(payload, FULL, format=name)
    with pytest.raises(RecordError, match="bytes of a record, got 0 bytes"):
        decode(b"", FULL)


def test_rows_of_which_all_are_cut_are_too_few() -> None:
    with pytest.raises(RecordError, match="expected more rows than the 4 that are cut, got 4"):
        decode(IDS, Expected(3, 2, 16, extra_rows=4))
