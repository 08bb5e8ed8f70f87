"""SGLang with a dtype tag: ``{routed_experts, routed_experts_dtype}`` out of ``meta_info``.

Source: SGLang PR 31219 (``SGLANG_ROUTED_EXPERTS_DTYPE``; still open when read): base64 of int32,
uint16 or uint8, the name beside it; without the name int32. ``routed_experts_start_len`` is read
where an answer repeats it. SGLang's offline engine leaves a tensor there. Other fields of
``meta_info`` are none of our business.
"""

from collections.abc import Mapping

from serve_app.records import Record
from serve_app.wire.formats import array
from serve_app.wire.formats.sglang import flat_ids
from serve_app.wire.payloads.base64_ids import write_ids
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_dtype, read_int
from serve_app.wire.payloads.refusal import refusal
from serve_app.wire.payloads.whole_rows import whole_rows

_DTYPES = ("int32", "uint16", "uint8")


def matches(payload: object) -> bool:
    """Tell an object with ``routed_experts``."""
    return isinstance(payload, Mapping) and "routed_experts" in payload


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of an answer's ``meta_info``, or of its part."""
    if not isinstance(payload, Mapping) or "routed_experts" not in payload:
        raise refusal("an object with routed_experts", payload)
    dtype = read_dtype(payload.get("routed_experts_dtype", "int32"), _DTYPES)
    start = expected.start
    if "routed_experts_start_len" in payload:
        start = read_int(payload["routed_experts_start_len"], "routed_experts_start_len", 0)
        expected.check_start(start)
    routes = payload["routed_experts"]
    ids = array.ids_of(routes) if array.matches(routes) else flat_ids(routes, dtype, expected)
    return expected.to_record(ids, start=start)


def encode(record: Record) -> dict[str, str | int]:
    """Return base64 at the stored width, its dtype and the position of the first row."""
    ids = whole_rows(record, "SGLang's base64")
    return {
        "routed_experts": write_ids(ids, ids.dtype),
        "routed_experts_dtype": ids.dtype.name,
        "routed_experts_start_len": record.start,
    }
