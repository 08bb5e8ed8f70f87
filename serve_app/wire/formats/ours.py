"""Ours: everything a record says, checked, in one buffer that is safe to take from a stranger.

``b"r3serve\\0" | version u16 | 0 u16 | header bytes u32 | checksum u64 | header | ids | valid``,
little-endian. The header is JSON padded with spaces, at most 64 KiB; the ids are C-order
``[rows, layers, top_k]`` of the width that the number of experts decides; ``valid``, where the
header says so, is a bit a row, the first row highest. The checksum (xxh3) covers header and
valid, and the header has the one of the ids. Sizes are compared with the bytes that are there
before anything is allocated; nothing is copied but where layers are dense.
"""

import json
import math
import re
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import FORMAT_VERSION, Record, checksum, make_record, narrowest_dtype
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_int, read_object, read_shape
from serve_app.wire.payloads.refusal import refusal, shown

MAGIC = b"r3serve\0"
_PREFIX = struct.Struct("<8sHHIQ")
_MAX_HEADER = 64 * 1024
_ALIGN = 16
_FIELDS = (
    "shape",
    "num_experts",
    "start",
    "moe_layers",
    "weight_version",
    "checksum",
    "token_hash",
    "valid",
)
_HASH = re.compile(r"[0-9a-f]{16}")


def to_bytes(record: Record) -> bytes:
    """Return the record as bytes."""
    meta = record.meta
    header = json.dumps(
        {
            "shape": [meta.rows, meta.layers, meta.top_k],
            "num_experts": record.num_experts,
            "start": int(meta.start),
            "moe_layers": list(meta.moe_layers),
            "weight_version": int(meta.weight_version),
            "checksum": f"{meta.checksum:016x}",
            "token_hash": None if meta.token_hash is None else f"{meta.token_hash:016x}",
            "valid": bool(meta.invalid),
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-(len(header) + _PREFIX.size) % _ALIGN)
    if len(header) > _MAX_HEADER:
        raise RecordError(f"expected a header of at most {_MAX_HEADER} bytes, got {len(header)}")
    valid = np.packbits(record.valid).tobytes() if meta.invalid else b""
    seal = checksum(np.frombuffer(header + valid, np.uint8))
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, 0, len(header), seal)
    return b"".join((prefix, header, np.ascontiguousarray(record.ids).data, valid))


def from_bytes(buffer: bytes | bytearray | memoryview) -> Record:
    """Return the record in a buffer; its ids are read-only and lie in the buffer if they can.

    Raises `RecordError` for any bytes that `to_bytes` did not write.
    """
    view = _flat(buffer)
    if len(view) < _PREFIX.size:
        raise RecordError(f"expected at least {_PREFIX.size} bytes of a record, got {len(view)}")
    magic, version, reserved, size, seal = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise refusal(f"a record that begins with {MAGIC!r}", magic)
    if version != FORMAT_VERSION:
        raise RecordError(f"expected record version {FORMAT_VERSION}, got version {version}")
    body = _PREFIX.size + size
    if reserved or size > _MAX_HEADER or body > len(view):
        raise RecordError(
            f"expected a header of at most {min(_MAX_HEADER, len(view) - _PREFIX.size)} bytes,"
            f" got {size} (reserved {reserved})"
        )
    text = bytes(view[_PREFIX.size : body])
    fields = _fields(text)
    shape = read_shape(fields["shape"])
    dtype = narrowest_dtype(read_int(fields["num_experts"], "num_experts", 1))
    if type(fields["valid"]) is not bool:
        raise refusal("valid as true or false", fields["valid"])
    end = body + math.prod(shape) * dtype.itemsize
    whole = end + (-(-shape[0] // 8) if fields["valid"] else 0)
    if len(view) != whole:
        raise RecordError(
            f"expected {whole} bytes of a record {dtype}{list(shape)}, got {len(view)}"
        )
    bits = bytes(view[end:])
    if (found := checksum(np.frombuffer(text + bits, np.uint8))) != seal:
        raise RecordError(f"expected a header of checksum {seal:016x}, bytes have {found:016x}")
    ids = np.frombuffer(view[body:end], dtype).reshape(shape)
    return _record(fields, ids, _valid(bits, shape[0]) if bits else None)


def matches(payload: object) -> bool:
    """Tell bytes that begin as ours do."""
    return isinstance(payload, (bytes, bytearray, memoryview)) and _flat(payload)[:8] == MAGIC


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of bytes; it must be of the expected model."""
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise refusal("a record's bytes", payload)
    return expected.check(from_bytes(payload))


def encode(record: Record) -> bytes:
    """Return `to_bytes` of the record."""
    return to_bytes(record)


def _flat(buffer: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous or not view.nbytes:
        raise RecordError(f"expected the contiguous bytes of a record, got {view.nbytes} bytes")
    return view.cast("B").toreadonly()


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected a JSON header, got {str(error)[:80]}") from None
    return dict(read_object(fields, _FIELDS, _FIELDS))


def _valid(bits: bytes, rows: int) -> npt.NDArray[np.bool_]:
    valid = np.unpackbits(np.frombuffer(bits, np.uint8))
    if valid[rows:].any() or valid[:rows].all():
        raise RecordError(f"expected a valid bit for each of {rows} rows, some of them 0")
    return valid[:rows].astype(np.bool_)


def _record(
    fields: dict[str, Any], ids: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None
) -> Record:
    layers = fields["moe_layers"]
    if not isinstance(layers, list) or not layers:
        raise refusal("moe_layers as a list of layers", layers)
    promised = _hash(fields["checksum"])
    if (found := checksum(ids)) != promised:
        raise RecordError(f"expected ids of checksum {promised:016x}, bytes have {found:016x}")
    made = make_record(
        ids,
        num_experts=fields["num_experts"],
        start=read_int(fields["start"], "start", 0),
        moe_layers=[read_int(layer, "each of moe_layers", 0) for layer in layers],
        weight_version=read_int(fields["weight_version"], "weight_version", -(2**63)),
        valid=valid,
    )
    if made.meta.checksum != promised:
        raise RecordError(f"expected zeros in the columns of dense layers, MoE: {shown(layers)}")
    made.ids.flags.writeable = False
    token_hash = None if fields["token_hash"] is None else _hash(fields["token_hash"])
    return Record(made.meta._replace(token_hash=token_hash), made.ids)


def _hash(value: object) -> int:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise refusal("a hash of 16 hex digits", value)
    return int(value, 16)
