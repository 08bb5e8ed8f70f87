"""A chain of records as one record."""

from collections.abc import Iterator, Sequence

import numpy as np

from serve_app.assemble.copying import Copies
from serve_app.assemble.layout import Filling
from serve_app.assemble.padding import Padding
from serve_app.assemble.stitch import Run, stitch
from serve_app.records import TOKENS, UNKNOWN, Record, Track, make_record
from serve_app.types import BatchSpec


def joined(segments: Sequence[Record]) -> Record:
    """Copy a chain of records into one; its version is the newest segment's.

    Of their tracks it has tokens, `UNKNOWN` where a segment has none, and those that every
    segment has.
    """
    first, last = segments[0].meta, segments[-1].meta
    start = min(segment.meta.start for segment in segments)
    rows = max(segment.meta.stop for segment in segments) - start
    ids = np.zeros((rows, first.layers, first.top_k), first.dtype)
    valid = np.ones(rows, dtype=np.bool_)
    padding, copies = Padding(BatchSpec(), first.num_experts), Copies()
    filling = Filling(ids, valid, range(first.layers), first, padding, copies)
    plan = stitch(segments, start, rows)
    filling.fill(0, plan)
    copies.run()
    whole = make_record(
        ids,
        num_experts=first.num_experts,
        start=start,
        moe_layers=first.moe_layers,
        weight_version=last.weight_version,
        valid=valid,
        tracks=_tracks(segments, plan.runs, rows),
        repeats="ours",
    )
    whole.ids.flags.writeable = False
    unrouted = {*whole.meta.unrouted_rows, *_unrouted(plan.runs)}
    return Record(
        whole.meta._replace(unrouted_rows=tuple(sorted(unrouted))), whole.ids, whole.tracks
    )


def _unrouted(runs: Sequence[Run]) -> Iterator[int]:
    """Yield the rows of the whole that nobody routed."""
    for target, segment, source, count in runs:
        for row in segment.meta.unrouted_rows:
            if source <= row < source + count:
                yield target + row - source


def _tracks(segments: Sequence[Record], runs: Sequence[Run], rows: int) -> dict[str, Track]:
    used = {id(run.segment): run.segment for run in runs}
    segments = list(used.values())  # those that no row comes from say nothing
    names = dict.fromkeys(name for segment in segments for name in segment.tracks)
    kept = [name for name in names if all(name in s.tracks for s in segments) or name == TOKENS]
    return {name: _track(name, runs, rows) for name in kept}


def _track(name: str, runs: Sequence[Run], rows: int) -> Track:
    """Put a track's rows where their routes go; rows that no segment has are empty, or 0."""
    parts = [
        (target, count, track.part(source, source + count))
        for target, segment, source, count in sorted(runs, key=lambda run: run.target)
        if (track := segment.tracks.get(name)) is not None
    ]
    if parts[0][2].offsets is None:
        like = parts[0][2].values
        values = np.full((rows, *like.shape[1:]), UNKNOWN if name == TOKENS else 0, like.dtype)
        for target, count, part in parts:
            values[target : target + count] = part.values
        return Track(values)
    counts = np.zeros(rows, np.int64)
    for target, count, part in parts:
        assert part.offsets is not None
        counts[target : target + count] = np.diff(part.offsets)
    values = np.concatenate([part.values for _, _, part in parts])
    return Track(values, np.concatenate([[0], np.cumsum(counts)]))
