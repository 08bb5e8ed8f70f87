"""SkyRL: ``{data, shape, dtype}``, ``data`` in base64.

Source: NovaSky-AI/SkyRL PR 1909 and 2234 (``pack_routed_experts``, the choices of
``/skyrl/v1/generate``): C-order, the first of uint8, int16 and int32 that holds every id.
"""

from collections.abc import Mapping
from typing import Any

from serve_app.records import Record
from serve_app.wire.payloads.base64_ids import read_ids, write_ids
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_dtype, read_object, read_shape
from serve_app.wire.payloads.whole_rows import whole_rows

_FIELDS = ("data", "shape", "dtype")
_DTYPES = ("uint8", "int16", "int32")


def matches(payload: object) -> bool:
    """Tell an object with data, shape and dtype, and no start."""
    return (
        isinstance(payload, Mapping)
        and all(name in payload for name in _FIELDS)
        and "start" not in payload
    )


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of an object with data, shape and dtype."""
    fields = read_object(payload, _FIELDS, _FIELDS)
    shape = read_shape(fields["shape"])
    expected.check_shape(shape)
    dtype = read_dtype(fields["dtype"], _DTYPES)
    return expected.to_record(read_ids(fields["data"], dtype, shape))


def encode(record: Record) -> dict[str, Any]:
    """Return data, shape and dtype."""
    ids = whole_rows(record, "SkyRL's object")
    experts = record.num_experts
    dtype = "uint8" if experts <= 256 else "int16" if experts <= 2**15 else "int32"
    return {"data": write_ids(ids, dtype), "shape": list(ids.shape), "dtype": dtype}
