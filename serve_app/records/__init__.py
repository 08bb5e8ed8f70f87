"""The record, and all that knows its bytes: dtype, layer map, checksums, tracks, validation.

Nothing else does. A record is a set of columns over the same rows of one sequence: the routes
(``ids``), and tracks beside them.
"""

from serve_app.records.ids import (
    MAX_EXPERTS,
    Ids,
    Rows,
    checksum,
    narrowest_dtype,
    one_tuple,
)
from serve_app.records.meta import FORMAT_VERSION, RecordMeta
from serve_app.records.parts import as_read, new_part_of, part_of
from serve_app.records.record import Record, Repeats, make_record, raw_record
from serve_app.records.tracks import (
    ALL_TRACKS,
    ROUTES,
    TOKENS,
    UNKNOWN,
    Track,
    TrackMeta,
    Tracks,
    hash_tokens,
)

__all__ = [
    "ALL_TRACKS",
    "FORMAT_VERSION",
    "MAX_EXPERTS",
    "ROUTES",
    "TOKENS",
    "UNKNOWN",
    "Ids",
    "Record",
    "RecordMeta",
    "Repeats",
    "Rows",
    "Track",
    "TrackMeta",
    "Tracks",
    "as_read",
    "checksum",
    "hash_tokens",
    "make_record",
    "narrowest_dtype",
    "new_part_of",
    "one_tuple",
    "part_of",
    "raw_record",
]
