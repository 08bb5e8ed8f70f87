"""Records on their way into a shard: everything but the bytes, or the bytes too if they are few."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.records import Record, RecordMeta

SMALL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Offer:
    """A record on its way into a shard; small ones bring their bytes along."""

    meta: RecordMeta
    tag: str | None
    lease_s: float | None
    parent: str | None
    data: bytes | None = None


def offer_of(record: Record, tag: str | None, lease_s: float | None, parent: str | None) -> Offer:
    """Offer a record of up to `SMALL_BYTES` with its bytes, a larger one without."""
    small = record.meta.nbytes <= SMALL_BYTES
    return Offer(record.meta, tag, lease_s, parent, record.ids.tobytes() if small else None)


def pack(offers: Sequence[Offer]) -> bytes:
    """Pickle offers here: Ray's pickler takes several times as long, and every put waits for it."""
    return pickle.dumps(offers, pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> list[Offer]:
    """Return what `pack` was given."""
    offers: list[Offer] = pickle.loads(packed)
    return offers
