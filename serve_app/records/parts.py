"""Some rows of a record as a record of their own."""

from serve_app.records.ids import checksum
from serve_app.records.record import Record


def part_of(record: Record, first: int, stop: int) -> Record:
    """Return the rows at sequence positions ``first .. stop`` of a record, tracks and all."""
    begin, end = first - record.start, stop - record.start
    ids = record.ids[begin:end]
    tracks = {name: track.part(begin, end) for name, track in record.tracks.items()}
    meta = record.meta.cut(begin, end)._replace(
        checksum=checksum(ids),
        tracks=tuple(track.meta(name) for name, track in tracks.items()),
    )
    return Record(meta, ids, tracks)


def as_read(record: Record) -> Record:
    """Return a record that promises those tracks alone that it was read with: to put it anew."""
    if len(record.tracks) == len(record.meta.tracks):
        return record
    kept = tuple(track for track in record.meta.tracks if track.name in record.tracks)
    return Record(record.meta._replace(tracks=kept), record.ids, record.tracks)


def new_part_of(record: Record, covered: int) -> Record:
    """Leave out the rows before position ``covered``; the last row stays in any case.

    A record is never empty, and of a row that two records have the earlier capture is read.
    """
    first = min(covered, record.meta.stop - 1)
    return record if first <= record.start else part_of(record, first, record.meta.stop)
