"""Records that continue others: store new rows only, wherever the earlier ones are near.

A key reads as its whole sequence, and the earliest capture of a row wins. So a child of a parent
on the same shard stores only the rows that its parent lacks; elsewhere it stores the whole.
"""

from collections.abc import Sequence

from serve_app.assemble.joining import joined
from serve_app.errors import RecordError
from serve_app.records import Record, RecordMeta, new_part_of
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


def continued(store: RecordStore, record: Record, parent: str) -> tuple[Record, str | None]:
    """Return what to put, and under which parent, so that the key reads as the whole sequence.

    Raises why ``parent`` cannot be read, or `RecordError` if it is of another model.
    """
    (chain,) = store.describe([parent])
    if not isinstance(chain, list):
        raise type(chain)(f"parent {shorten(parent)}: {chain}")
    _check_model(record, chain[0], parent)
    if store.is_local(parent):
        return new_part_of(record, covered(chain)), parent
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
