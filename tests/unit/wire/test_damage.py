"""Damaged payloads of every format are refused, and what is wrong with them is named."""

import base64
import struct
from typing import Any

import numpy as np
import pytest

from serve_app.errors import RecordError
from serve_app.wire.expected import Expected
from serve_app.wire.registry import decode, encode
from tests.unit.wire.samples import FULL, IDS, NAMES, npy, routes


def test_every_cut_of_every_format_is_noticed() -> None:
    for name in NAMES:
        payload = encode(routes(), name)
        if isinstance(payload, dict):
            text = "data" if "data" in payload else "routed_experts"
            cuts = [{**payload, text: payload[text][:n]} for n in range(len(payload[text]))]
        else:
            cuts = [payload[:n] for n in range(len(payload))]
        whole = Expected(3, 2, 16, (1, 2), rows=4)
        for cut in cuts:
            with pytest.raises(RecordError):
                decode(cut, whole, format=name, allow_pickle=True)


def npy_header(text: str) -> str:
    header = text.encode() + b"\n"
    return base64.b64encode(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header).decode()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 3, 2), }"),
         "expected 6000000000000 bytes of uint8.*, got 0"),
        (npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3, 2), }"), "npy header"),
        (npy_header("__import__('os').abort()"), "npy header"),
        (npy_header("(" * 900), "npy header"),
        (npy(IDS.astype(float)), "npy header of integers"),
        (npy(IDS[0]), "npy header of integers"),
        (npy(np.array([[[IDS]]], dtype=object), allow_pickle=True), "npy header"),
        (base64.b64encode(b"\x93NUMPY\7\0" + b"x" * 40).decode(), "version 1, 2 or 3"),
        (npy(IDS)[:-4], r"expected 24 bytes of uint8\[4, 3, 2\] in .npy, got 2\d"),
        (npy(IDS) + "!", "base64 text of"),
        ("nrlre1:int8:1000000000000x3x2:", "expected 6000000000000 bytes of int8"),
        ("nrlre1:int8:4x3x2:AAAA", r"24 bytes of int8\[4, 3, 2\] as base64, got 4 characters"),
        ("nrlre1:int8:4x3:AAAA", "nrlre1:<dtype>"),
        ("nrlre1:int64:4x3x2:AAAA", "dtype as one of int8, int16, int32, got 'int64'"),
        ("nrlre1:int8:4x9x2:AAAA", r"ids \[rows, 3, 2\], got list\[4, 9, 2\]"),
        ({"data": "", "shape": [10**12, 3, 2], "dtype": "uint8"}, "expected 6000000000000 bytes"),
        ({"data": "A" * 32, "shape": [4, 3, 2], "dtype": "float32"}, "dtype as one of"),
        ({"data": "A" * 31 + "!", "shape": [4, 3, 2], "dtype": "uint8"}, "base64 text"),
        ({"data": "A" * 31 + "é", "shape": [4, 3, 2], "dtype": "uint8"}, "base64 text"),
        ({"data": b"", "shape": [4, 3, 2], "dtype": "uint8"}, "expected base64 text, got b''"),
        ({"data": "", "shape": "4x3", "dtype": "uint8"}, "shape as"),
        ({"data": "", "shape": [4, 3, 2], "dtype": "uint8", "zip": 1}, "got 'zip' too"),
        ({"data": "", "shape": [4, 3, 2], "start": -1}, "start as an integer"),
        ({"data": "", "shape": [4, 3, 2], "start": True}, "start as an integer"),
        ({"routed_experts": None}, "expected base64 text, got None"),
        ({"routed_experts": "AAAA", "routed_experts_dtype": "int8"}, "int32, uint16, uint8"),
        ({"routed_experts": [[[1]]]}, "expected base64 text, got list"),
        ({"some": "thing"}, "like none of them"),
        ("AAAAAAAA", r"base64 of int32\[rows, 3, 2\], got 8 characters"),
        ("hello, world", "like none of them"),
        ("", "got no rows: nothing was recorded in ''"),
        (None, "got None, like none of them"),
        (10**400, "int of 1329 bits, like none"),
        ([1], r"a list \[rows\]\[layers\]\[top_k\], got list\[1\]"),
        ([[[1, 2], [3, 4], [5, 16]]], r"ids must be in \[0, 16\), got 16"),
        ([[[1, 2], [3, 4], [5, 2**31]]], "one beyond 32 bits"),
        ([[[1, 2], [3, 4], [5, 10**5_000]]], "one beyond 32 bits"),
        ([[[1, 2], [3, 4], [5, -1]]], "row of -1, got row 0 with both"),
        ([[[1, 2], [3, 4], [5, -2]]], "got -2"),
        ([[[1, 2], [3, 4], [5, 6.0]]], "ids as integers, got float"),
        ([[[1, 2], [3, 4], [5, "6"]]], "ids as integers, got str"),
        ([[[1, 2], [3, 4], [5, True]]], "ids as integers, got bool"),
        ([[[1, 2], [3, 4], [5]]], r"lists of 2 \(top_k\), got one of 1"),
        ([[[1, 2], [3, 4], 5]], r"lists of 2 \(top_k\), got int"),
        ([[[1, 2]] * 3, [[1, 2]] * 2], r"lists of 3 \(layers\), got one of 2"),
        ([[[1, 2]] * 4], r"ids \[rows, 3, 2\], got list\[1, 4, 2\]"),
        ([[[[1, 1], [2, 2]]] * 3], "ids as integers, got list"),
        (IDS.astype(np.float32), r"integer ids, got float32\[4, 3, 2\]"),
        (IDS.astype(object), "integer ids, got object"),
        (IDS > 3, "integer ids, got bool"),
        (IDS[..., None], r"ids \[rows, 3, 2\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(payload: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode(payload, FULL)


def deep_list(depth: int) -> Any:
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    return nested


def test_lists_too_deep_are_refused_however_deep() -> None:
    for depth in (1, 2, 4, 65, 50_000):
        with pytest.raises(RecordError):
            decode(deep_list(depth), Expected(1, 1, 4))
