"""A chain of records as one record."""

from collections.abc import Sequence

import numpy as np

from serve_app.assemble.copying import Copies
from serve_app.assemble.layout import Filling
from serve_app.assemble.padding import Padding
from serve_app.assemble.stitch import stitch
from serve_app.records import Record, make_record
from serve_app.types import BatchSpec


def joined(segments: Sequence[Record]) -> Record:
    """Copy a chain of records into one; its version is the newest segment's."""
    first, last = segments[0].meta, segments[-1].meta
    start = min(segment.meta.start for segment in segments)
    rows = max(segment.meta.stop for segment in segments) - start
    ids = np.zeros((rows, first.layers, first.top_k), first.dtype)
    valid = np.ones(rows, dtype=np.bool_)
    padding, copies = Padding(BatchSpec(), first.num_experts), Copies()
    filling = Filling(ids, valid, range(first.layers), first, padding, copies)
    filling.fill(0, stitch(segments, start, rows))
    copies.run()
    whole = make_record(
        ids,
        num_experts=first.num_experts,
        start=start,
        moe_layers=first.moe_layers,
        weight_version=last.weight_version,
        valid=valid,
    )
    whole.ids.flags.writeable = False
    return whole
