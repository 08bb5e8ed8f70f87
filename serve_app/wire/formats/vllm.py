"""vLLM: base64 of an ``.npy`` file, uint8 up to 256 experts, then uint16.

Source: vLLM's OpenAI answers since 0.22 (PR 38939, ``choices[].routed_experts``) and PR 51906
(``routed_experts_prompt_start``, which the answer does not repeat: ``expected.start`` must):
``np.save(allow_pickle=False)``, all layers, dense ones included. The header is read by a pattern,
never evaluated, and compared with the bytes that are there.
"""

import base64
import io
import math
import re
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record
from serve_app.wire.payloads.base64_ids import read_bytes
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_shape
from serve_app.wire.payloads.refusal import refusal
from serve_app.wire.payloads.whole_rows import whole_rows

_MAGIC = b"\x93NUMPY"
_TEXT = base64.b64encode(_MAGIC).decode()
_LENGTH = {1: struct.Struct("<H"), 2: struct.Struct("<I"), 3: struct.Struct("<I")}
_MAX_HEADER = 1024
_HEADER = re.compile(
    rb"\{'descr': '([|<>][iu][1248])', 'fortran_order': (False|True),"
    rb" 'shape': \(([0-9]{1,18}), ([0-9]{1,18}), ([0-9]{1,18})\),? ?\} *\n?"
)


def matches(payload: object) -> bool:
    """Tell base64 of what begins as ``.npy`` does."""
    return isinstance(payload, str) and payload.startswith(_TEXT)


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of a base64 ``.npy``."""
    return expected.to_record(_read_npy(read_bytes(payload), expected))


def encode(record: Record) -> str:
    """Return base64 of the ids' ``.npy``."""
    file = io.BytesIO()
    np.save(file, whole_rows(record, "vLLM's .npy"), allow_pickle=False)
    return base64.b64encode(file.getbuffer()).decode()


def _read_npy(raw: bytes, expected: Expected) -> npt.NDArray[Any]:
    length = _LENGTH.get(raw[6]) if len(raw) >= 12 and raw.startswith(_MAGIC) else None
    if length is None:
        raise refusal("an .npy file of version 1, 2 or 3", raw)
    begin = 8 + length.size
    end = begin + length.unpack_from(raw, 8)[0]
    header = _HEADER.fullmatch(raw[begin : min(end, begin + _MAX_HEADER)])
    if end > len(raw) or header is None:
        raise refusal("an .npy header of integers [rows, layers, top_k]", raw[begin : begin + 128])
    dtype = np.dtype(header[1].decode())
    shape = read_shape([int(size) for size in header.groups()[2:]])
    expected.check_shape(shape)
    if (promised := math.prod(shape) * dtype.itemsize) != len(raw) - end:
        raise RecordError(
            f"expected {promised} bytes of {dtype}{list(shape)} in .npy, got {len(raw) - end}"
        )
    order: Any = "F" if header[2] == b"True" else "C"
    return np.frombuffer(raw, dtype, offset=end).reshape(shape, order=order)
