"""Ours: everything a record says, checked, in one buffer that is safe to take from a stranger.

``b"r3serve\\0" | version u16 | 0 u16 | header bytes u32 | checksum u64 | header | ids | valid |
tracks``, little-endian. The header is JSON padded with spaces, at most 64 KiB; the ids are C-order
``[rows, layers, top_k]`` of the width that the number of experts decides; ``valid``, where the
header says so, is a bit a row, the first row highest. Each track begins, after zeros, at a multiple
of 16 bytes, as it is stored (`serve_app.records.tracks`); the header has its name, dtype, shape and
number of values. The checksum (xxh3) covers header and valid, and the header has those of ids and
tracks. Sizes are compared with the bytes that are there before anything is allocated; nothing is
copied but where layers are dense. Version 1, which had no tracks, is read too.
"""

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import (
    FORMAT_VERSION,
    Record,
    Track,
    checksum,
    make_record,
    narrowest_dtype,
)
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_int, read_object, read_shape
from serve_app.wire.payloads.refusal import refusal, shown
from serve_app.wire.payloads.sealed_tracks import read_seal, read_tracks, sealed_track

MAGIC = b"r3serve\0"
_PREFIX = struct.Struct("<8sHHIQ")
_MAX_HEADER = 64 * 1024
_ALIGN = 16
_COMMON = (
    "shape",
    "num_experts",
    "start",
    "moe_layers",
    "weight_version",
    "checksum",
    "valid",
)
_FIELDS_OF = {
    1: (*_COMMON, "token_hash"),
    2: (*_COMMON, "tracks", "unrouted"),
}


def to_bytes(record: Record) -> bytes:
    """Return the record as bytes, with those of its tracks that are there."""
    meta = record.meta
    headers = [track for track in meta.tracks if track.name in record.tracks]
    header = json.dumps(
        {
            "shape": [meta.rows, meta.layers, meta.top_k],
            "num_experts": record.num_experts,
            "start": int(meta.start),
            "moe_layers": list(meta.moe_layers),
            "weight_version": int(meta.weight_version),
            "checksum": f"{meta.checksum:016x}",
            "valid": bool(meta.invalid),
            "unrouted": list(meta.unrouted_rows),
            "tracks": [
                {
                    "name": track.name,
                    "dtype": track.dtype,
                    "shape": list(track.shape),
                    "values": track.values,
                    "checksum": f"{track.checksum:016x}",
                }
                for track in headers
            ],
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-(len(header) + _PREFIX.size) % _ALIGN)
    if len(header) > _MAX_HEADER:
        raise RecordError(f"expected a header of at most {_MAX_HEADER} bytes, got {len(header)}")
    valid = np.packbits(record.valid).tobytes() if meta.invalid else b""
    seal = checksum(np.frombuffer(header + valid, np.uint8))
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, 0, len(header), seal)
    parts: list[Any] = [prefix, header, np.ascontiguousarray(record.ids).data, valid]
    size = len(prefix) + len(header) + record.ids.nbytes + len(valid)
    for track in headers:
        buffer = record.tracks[track.name].buffer()
        padding = -size % _ALIGN
        parts += [bytes(padding), buffer.data]
        size += padding + buffer.nbytes
    return b"".join(parts)


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
    if version not in _FIELDS_OF:
        raise RecordError(f"expected record version 1 or {FORMAT_VERSION}, got version {version}")
    body = _PREFIX.size + size
    if reserved or size > _MAX_HEADER or body > len(view):
        raise RecordError(
            f"expected a header of at most {min(_MAX_HEADER, len(view) - _PREFIX.size)} bytes,"
            f" got {size} (reserved {reserved})"
        )
    text = bytes(view[_PREFIX.size : body])
    fields = _fields(text, _FIELDS_OF[version])
    shape = read_shape(fields["shape"])
    dtype = narrowest_dtype(read_int(fields["num_experts"], "num_experts", 1))
    if type(fields["valid"]) is not bool:
        raise refusal("valid as true or false", fields["valid"])
    tracks = read_tracks(fields.get("tracks", []), shape[0])
    end = body + math.prod(shape) * dtype.itemsize
    bits_end = end + (-(-shape[0] // 8) if fields["valid"] else 0)
    whole, places = bits_end, list[int]()
    for track in tracks:
        places.append(whole + -whole % _ALIGN)
        whole = places[-1] + track.nbytes(shape[0])
    if len(view) != whole:
        raise RecordError(
            f"expected {whole} bytes of a record {dtype}{list(shape)}, got {len(view)}"
        )
    bits = bytes(view[end:bits_end])
    if (found := checksum(np.frombuffer(text + bits, np.uint8))) != seal:
        raise RecordError(f"expected a header of checksum {seal:016x}, bytes have {found:016x}")
    ids = np.frombuffer(view[body:end], dtype).reshape(shape)
    before = bits_end
    for track, place in zip(tracks, places, strict=True):
        if any(view[before:place]):
            raise RecordError(f"expected zeros before track {track.name!r}")
        before = place + track.nbytes(shape[0])
    columns = {
        track.name: sealed_track(track, view[place : place + track.nbytes(shape[0])], shape[0])
        for track, place in zip(tracks, places, strict=True)
    }
    return _record(fields, ids, _valid(bits, shape[0]) if bits else None, columns)


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


def _fields(text: bytes, names: Sequence[str]) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected a JSON header, got {str(error)[:80]}") from None
    return dict(read_object(fields, names, names))


def _valid(bits: bytes, rows: int) -> npt.NDArray[np.bool_]:
    valid = np.unpackbits(np.frombuffer(bits, np.uint8))
    if valid[rows:].any() or valid[:rows].all():
        raise RecordError(f"expected a valid bit for each of {rows} rows, some of them 0")
    return valid[:rows].astype(np.bool_)


def _record(
    fields: dict[str, Any],
    ids: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None,
    tracks: dict[str, Track],
) -> Record:
    layers = fields["moe_layers"]
    if not isinstance(layers, list) or not layers:
        raise refusal("moe_layers as a list of layers", layers)
    promised = read_seal(fields["checksum"])
    if (found := checksum(ids)) != promised:
        raise RecordError(f"expected ids of checksum {promised:016x}, bytes have {found:016x}")
    made = make_record(
        ids,
        num_experts=fields["num_experts"],
        start=read_int(fields["start"], "start", 0),
        moe_layers=[read_int(layer, "each of moe_layers", 0) for layer in layers],
        weight_version=read_int(fields["weight_version"], "weight_version", -(2**63)),
        valid=valid,
        tracks=tracks,
    )
    if made.meta.checksum != promised:
        raise RecordError(f"expected zeros in the columns of dense layers, MoE: {shown(layers)}")
    made.ids.flags.writeable = False
    unrouted = {*made.meta.unrouted_rows, *_unrouted(fields.get("unrouted", 0), made.meta.invalid)}
    meta = made.meta._replace(unrouted_rows=tuple(sorted(unrouted)))
    return Record(meta, made.ids, made.tracks)


def _unrouted(said: Any, invalid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the invalid rows that nobody routed; once only how many there are was said."""
    if not isinstance(said, list):
        return invalid[: read_int(said, "unrouted", 0, len(invalid))]
    rows = tuple(read_int(row, "each of unrouted", 0) for row in said)
    if not set(rows) <= set(invalid):
        raise refusal("unrouted rows among those that are not valid", said)
    return rows
