"""Records that continue others: store new rows only, wherever the earlier ones are near.

A key reads as its whole sequence, and the earliest capture of a row wins. So a child of a parent
on the same shard stores only the rows that its parent lacks; elsewhere it stores the whole.
"""

from collections.abc import Sequence

import numpy as np

from serve_app.assemble.layout import fill
from serve_app.assemble.stitch import stitch
from serve_app.errors import RecordError
from serve_app.records import Record, RecordMeta, make_record
from serve_app.store.base import RecordStore
from serve_app.store.keys import shorten


def covered(chain: Sequence[RecordMeta]) -> int:
    """Return how many rows, from row 0 on, a key's segments cover without a gap."""
    rows = 0
    for meta in sorted(chain, key=lambda meta: meta.start):
        if meta.start > rows:
            break
        rows = max(rows, meta.stop)
    return rows


def joined(segments: Sequence[Record]) -> Record:
    """Copy a chain of records into one; its version is the newest segment's."""
    first, last = segments[0].meta, segments[-1].meta
    start = min(segment.meta.start for segment in segments)
    rows = max(segment.meta.stop for segment in segments) - start
    ids = np.zeros((rows, first.layers, first.top_k), first.dtype)
    valid = np.zeros(rows, dtype=np.bool_)
    fill(ids, valid, segments, stitch(segments, start, rows))
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


def continued(store: RecordStore, record: Record, parent: str) -> tuple[Record, str | None]:
    """Return what to put, and under which parent, so that the key reads as the whole sequence.

    Raises why ``parent`` cannot be read, or `RecordError` if it is of another model.
    """
    (chain,) = store.describe([parent])
    if not isinstance(chain, list):
        raise type(chain)(f"parent {shorten(parent)}: {chain}")
    _check_model(record, chain[0], parent)
    if store.is_local(parent):
        return _from_row(record, covered(chain)), parent
    (segments,) = store.fetch([parent])
    if not isinstance(segments, list):
        raise type(segments)(f"parent {shorten(parent)}: {segments}")
    return joined([*segments, record]), None


def _check_model(record: Record, parent: RecordMeta, key: str) -> None:
    new = (record.meta.layers, record.meta.top_k, record.num_experts, record.moe_layers)
    old = (parent.layers, parent.top_k, parent.num_experts, parent.moe_layers)
    if new != old:
        raise RecordError(
            f"parent {shorten(key)} has (layers, top_k, experts, MoE layers) {old}, got {new}"
        )


def _from_row(record: Record, first: int) -> Record:
    """Cut rows before ``first``; the last row stays, since a record is never empty."""
    cut = min(max(0, first - record.start), record.meta.rows - 1)
    if not cut:
        return record
    return make_record(
        record.ids[cut:],
        num_experts=record.num_experts,
        start=record.start + cut,
        moe_layers=record.moe_layers,
        weight_version=record.weight_version,
        valid=record.valid[cut:],
    )
