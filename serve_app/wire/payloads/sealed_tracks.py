"""Tracks in a stranger's bytes: their headers, and that the values are what those promise."""

import math
import re
from typing import Any

import numpy as np

from serve_app.errors import RecordError
from serve_app.records import Track, TrackMeta
from serve_app.records.tracks import DTYPES, MAX_DIMENSIONS, MAX_TRACKS, checked_track
from serve_app.wire.payloads.fields import read_int, read_object
from serve_app.wire.payloads.refusal import refusal

_FIELDS = ("name", "dtype", "shape", "values", "checksum")
_SEAL = re.compile(r"[0-9a-f]{16}")
_MOST = 2**40
"""Bytes; larger sizes could overflow on the way to being compared with what came."""


def read_seal(value: object) -> int:
    """Return a checksum of 16 hex digits."""
    if not isinstance(value, str) or not _SEAL.fullmatch(value):
        raise refusal("a checksum of 16 hex digits", value)
    return int(value, 16)


def read_tracks(value: object, rows: int) -> list[TrackMeta]:
    """Return the headers of ``rows`` rows' tracks; their sizes are small enough to add up."""
    if not isinstance(value, list) or len(value) > MAX_TRACKS:
        raise refusal(f"tracks as a list of up to {MAX_TRACKS}", value)
    tracks = [_track(item, rows) for item in value]
    if len({track.name for track in tracks}) < len(tracks):
        raise RecordError(f"expected each track once, got {[track.name for track in tracks]}")
    return tracks


def sealed_track(header: TrackMeta, buffer: memoryview, rows: int) -> Track:
    """Return the track in a buffer of its size; `RecordError` if it is not what was promised."""
    track = header.over(np.frombuffer(buffer, np.uint8), rows)
    made = checked_track(header.name, track, rows)
    if (found := made.meta(header.name)) != header:
        raise RecordError(f"expected a track {header}, bytes have {found}")
    return made


def _track(item: Any, rows: int) -> TrackMeta:
    fields = read_object(item, _FIELDS, _FIELDS)
    name, dtype, shape = fields["name"], fields["dtype"], fields["shape"]
    if not isinstance(name, str) or len(name) > 64:
        raise refusal("a track's name", name)
    if dtype not in DTYPES:
        raise refusal(f"a track's dtype as one of {', '.join(DTYPES)}", dtype)
    if not isinstance(shape, list) or len(shape) >= MAX_DIMENSIONS:
        raise refusal(f"a track's shape as a list of fewer than {MAX_DIMENSIONS}", shape)
    sizes = tuple(read_int(size, "each size of a track's shape", 0, _MOST) for size in shape)
    values = fields["values"]
    count = None if values is None else read_int(values, "values", 0, _MOST)
    if math.prod(max(size, 1) for size in (*sizes, count or rows)) > _MOST:
        raise refusal(f"a track of at most {_MOST} values", [*sizes, count or rows])
    return TrackMeta(name, dtype, sizes, count, read_seal(fields["checksum"]))
