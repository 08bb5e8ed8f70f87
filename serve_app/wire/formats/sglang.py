"""SGLang: base64 of int32 ``[rows, layers, top_k]`` without its shape.

Source: SGLang ``python/sglang/srt/managers/detokenizer_manager.py`` since PR 12162, answered as
``meta_info["routed_experts"]`` or in ``sgl_ext``; all hidden layers, fused shared experts cut.
With the request's ``routed_experts_start_len`` the prefix is omitted, and the answer does not
say so: ``expected.start`` must.
"""

import base64
import binascii
from typing import Any

import numpy as np

from serve_app.errors import RecordError
from serve_app.records import Record
from serve_app.wire.payloads.base64_ids import read_ids, write_ids
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.refusal import no_rows, refusal
from serve_app.wire.payloads.whole_rows import whole_rows

_INT32 = np.dtype("<i4")


def matches(payload: object) -> bool:
    """Tell base64 whose first four bytes are an expert id or -1: others' magic numbers are none."""
    if not isinstance(payload, str) or len(payload) < 8:
        return False
    try:
        first = base64.b64decode(payload[:8], validate=True)
    except (binascii.Error, ValueError):
        return False
    return first[2:4] == b"\0\0" or first[:4] == b"\xff\xff\xff\xff"


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of int32 base64."""
    return expected.to_record(flat_ids(payload, _INT32, expected))


def encode(record: Record) -> str:
    """Return int32 base64."""
    return write_ids(whole_rows(record, "SGLang's base64"), _INT32)


def flat_ids(text: object, dtype: np.dtype[Any], expected: Expected) -> Any:
    """Return ids ``[rows, layers or MoE layers, top_k]`` whose shape only the model tells.

    MoE layers alone are told from a cut tail by ``expected.rows``; without it, all layers.
    """
    if not isinstance(text, str):
        raise refusal("base64 text", text)
    if not text:
        raise no_rows(text)
    padding = len(text[-2:]) - len(text[-2:].rstrip("="))
    count, odd = divmod(len(text) // 4 * 3 - padding, dtype.itemsize * expected.top_k)
    rows = count // expected.layers if expected.sent_rows is None else expected.sent_rows
    layers = len(expected.moe) if count == rows * len(expected.moe) else expected.layers
    if odd or rows * layers != count or rows < 1:
        raise RecordError(
            f"expected base64 of {dtype}[{expected.sent_rows or 'rows'}, {expected.layers},"
            f" {expected.top_k}], got {len(text)} characters"
        )
    return read_ids(text, dtype, (rows, layers, expected.top_k))
