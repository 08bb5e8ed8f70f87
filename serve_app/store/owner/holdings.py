"""What a shard holds: records in a ledger, their memory in a budget. No actor calls.

A record's payload is its columns', routes first: few bytes themselves, or one piece of a blob:
arrays that were pulled together, whose memory comes back when the last of them is dropped.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.errors import KeyUnreadable, StoreError
from serve_app.records import one_tuple
from serve_app.store.offers import Offer, columns_of
from serve_app.store.owner.budget import Budget
from serve_app.store.owner.ledger import Ledger
from serve_app.types import ShardStats

if TYPE_CHECKING:
    import ray

    from serve_app.store.outbox import Batch

DROP_AT_ONCE = 100
"""Dropping a Ray object takes 150-300 µs: so many at a time keep the loop responsive."""


@dataclass(slots=True)
class Blob:
    """Arrays that were pulled together."""

    ref: "ray.ObjectRef[Batch]"
    nbytes: int
    needed: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One record's column in a blob."""

    blob: Blob
    index: int


Column = bytes | Piece
Payload = tuple[Column, ...]


@dataclass(slots=True)
class Counts:
    """What happened since the shard's process started."""

    puts: int = 0
    gets: int = 0
    full: int = 0
    lost: int = 0
    shared_rows: int = 0
    unrouted_rows: int = 0


class Holdings:
    """Records and the bytes they take, counted exactly."""

    def __init__(self, byte_budget: int) -> None:
        self.budget = Budget(byte_budget)
        self.ledger: Ledger[Payload] = Ledger()
        self.counts = Counts()
        self._to_drop: deque[Payload] = deque()

    async def reserve(self, nbytes: int, timeout_s: float) -> None:
        """Wait for room; raise `StoreFull` when none came."""
        try:
            await self.budget.take(nbytes, timeout_s)
        except StoreError:
            self.counts.full += 1
            raise

    def keep(self, offer: Offer, payload: Payload, lease_s: float, parent: int | None) -> int:
        """Add a record whose bytes were reserved; drop them again if its parent is gone."""
        meta = offer.meta._replace(moe_layers=one_tuple(offer.meta.moe_layers))
        try:
            seq = self.ledger.add(
                meta,
                payload,
                now=time.monotonic(),
                lease_s=offer.lease_s or lease_s,
                tag=offer.tag,
                parent=parent,
                parent_rows=offer.parent_rows,
            )
        except KeyUnreadable:
            self.drop(payload)
            raise
        self.counts.puts += 1
        self.counts.unrouted_rows += meta.unrouted
        if parent is not None:
            self.counts.shared_rows += offer.meta.start
        return seq

    def collect(self) -> bool:
        """Drop some of what nothing needs any more; True if more is left."""
        self._to_drop.extend(self.ledger.take_dropped())
        for _ in range(min(DROP_AT_ONCE, len(self._to_drop))):
            self.drop(self._to_drop.popleft())
        return bool(self._to_drop)

    def drop(self, payload: Payload) -> None:
        """Give a payload's memory back; that of a blob with its last piece."""
        freed = 0
        for column in payload:
            if isinstance(column, bytes):
                freed += len(column)
                continue
            column.blob.needed -= 1
            if not column.blob.needed:
                freed += column.blob.nbytes
        if freed:
            self.budget.give(freed)

    def stats(self, shard: str, reserved: int) -> ShardStats:
        """Count what is held and what happened; ``reserved`` bytes have not arrived yet."""
        return ShardStats(
            shard=shard,
            live_keys=self.ledger.live,
            live_bytes=self.budget.used - reserved,
            byte_budget=self.budget.total,
            waiting_puts=self.budget.waiting,
            puts=self.counts.puts,
            gets=self.counts.gets,
            released=self.ledger.released,
            expired=self.ledger.expired,
            full=self.counts.full,
            lost=self.counts.lost,
            shared_rows=self.counts.shared_rows,
            unrouted_rows=self.counts.unrouted_rows,
            oldest_s=self.ledger.oldest_s(time.monotonic()),
        )


def pieces_of(
    offers: Sequence[Offer], refs: "Mapping[str, ray.ObjectRef[Batch]]"
) -> list[dict[str, Piece]]:
    """Return, for each offer, the columns of it that did not come along, by name.

    ``refs`` has one object a column, as `serve_app.store.offers.objects_of` names them.
    """
    blobs = {name: Blob(ref, 0, 0) for name, ref in refs.items()}
    pieces: list[dict[str, Piece]] = []
    for offer in offers:
        own: dict[str, Piece] = {}
        for name in columns_of(offer):
            blob = blobs[name]
            own[name] = Piece(blob, blob.needed)
            blob.needed += 1
            blob.nbytes += offer.meta.size_of(name)
        pieces.append(own)
    return pieces
