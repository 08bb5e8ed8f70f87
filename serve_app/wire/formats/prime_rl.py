"""prime-rl: ``{data, shape, start, dtype}``, ``data`` in base64.

Source: PrimeIntellect-ai/prime-rl ``src/prime_rl/inference/vllm/routed_experts.py``; ``start`` is
the request's ``routed_experts_prompt_start``; ``dtype`` (uint8 or uint16) came with PR 3051,
before it always uint8. dynamo's vLLM worker sends the same (PR 10529).
"""

from collections.abc import Mapping
from typing import Any

from serve_app.records import Record
from serve_app.wire.payloads.base64_ids import read_ids, write_ids
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_dtype, read_int, read_object, read_shape
from serve_app.wire.payloads.whole_rows import whole_rows

_NEEDED = ("data", "shape", "start")
_FIELDS = (*_NEEDED, "dtype")
_DTYPES = ("uint8", "uint16", "int16", "int32", "int64")


def matches(payload: object) -> bool:
    """Tell an object with data, shape and start."""
    return isinstance(payload, Mapping) and all(name in payload for name in _NEEDED)


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of an object with data, shape and start."""
    fields = read_object(payload, _NEEDED, _FIELDS)
    start = read_int(fields["start"], "start", 0)
    expected.check_start(start)
    shape = read_shape(fields["shape"])
    expected.check_shape(shape)
    dtype = read_dtype(fields.get("dtype", "uint8"), _DTYPES)
    return expected.to_record(read_ids(fields["data"], dtype, shape), start=start)


def encode(record: Record) -> dict[str, Any]:
    """Return data, shape, start and dtype."""
    ids = whole_rows(record, "prime-rl's object")
    return {
        "data": write_ids(ids, ids.dtype),
        "shape": list(ids.shape),
        "start": record.start,
        "dtype": ids.dtype.name,
    }
