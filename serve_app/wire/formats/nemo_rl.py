"""NeMo-RL: ``nrlre1:<dtype>:<rows>x<layers>x<top_k>:<base64>``; a row of -1 routes natively.

Source: NVIDIA-NeMo/RL ``nemo_rl/utils/routed_experts_codec.py`` (PR 3292), read by NeMo-Gym too;
``[tokens, num_moe_layers, topk]``; int8 up to 128 experts, int16 up to 32,768, then int32 (PR
3113). A row that is negative in part is damaged there as well.
"""

import re

import numpy as np

from serve_app.records import Record
from serve_app.wire.payloads.base64_ids import read_ids, write_ids
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_dtype, read_shape
from serve_app.wire.payloads.refusal import refusal

_MAGIC = "nrlre1:"
_DTYPES = ("int8", "int16", "int32")
_HEADER = re.compile(r"nrlre1:([a-z0-9]{1,8}):([0-9]{1,18})x([0-9]{1,18})x([0-9]{1,18}):")


def matches(payload: object) -> bool:
    """Tell a text that begins with nrlre1."""
    return isinstance(payload, str) and payload.startswith(_MAGIC)


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of an envelope; rows of -1 are invalid."""
    header = _HEADER.match(payload) if isinstance(payload, str) else None
    if not isinstance(payload, str) or header is None:
        raise refusal("nrlre1:<dtype>:<rows>x<layers>x<top_k>:<base64>", payload)
    dtype = read_dtype(header[1], _DTYPES)
    shape = read_shape([int(size) for size in header.groups()[1:]])
    expected.check_shape(shape)
    return expected.to_record(read_ids(payload[header.end() :], dtype, shape), native_rows=True)


def encode(record: Record) -> str:
    """Return the envelope of the MoE layers; invalid rows are -1."""
    experts = record.num_experts
    dtype = "int8" if experts <= 128 else "int16" if experts <= 2**15 else "int32"
    ids = record.ids[:, list(record.moe_layers)].astype(dtype)
    ids[~record.valid] = np.array(-1, dtype)
    return f"{_MAGIC}{dtype}:{'x'.join(map(str, ids.shape))}:{write_ids(ids, dtype)}"
