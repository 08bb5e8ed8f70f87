"""Records on their way into a shard: everything but the bytes, or the bytes too if they are few."""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from serve_app.records import ROUTES, Record, RecordMeta

SMALL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Offer:
    """A record on its way into a shard; ``data`` are the routes and the tracks in their order.

    Few bytes come along; None stands for what is fetched or sent apart. Of the ``parent``'s
    sequence the first ``parent_rows`` are the record's beginning, all where that is None.
    """

    meta: RecordMeta
    tag: str | None
    lease_s: float | None
    parent: str | None
    data: tuple[bytes | None, ...]
    parent_rows: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all bytes came along."""
        return None not in self.data


def offer_of(
    record: Record,
    tag: str | None,
    lease_s: float | None,
    parent: str | None,
    parent_rows: int | None = None,
) -> Offer:
    """Offer a record of up to `SMALL_BYTES` with its bytes; of a larger one with small tracks."""
    meta = record.meta
    small = meta.nbytes <= SMALL_BYTES
    tracks = tuple(
        record.tracks[track.name].buffer().tobytes()
        if track.nbytes(meta.rows) <= SMALL_BYTES
        else None
        for track in meta.tracks
    )
    data = (record.ids.tobytes() if small else None, *tracks)
    return Offer(meta, tag, lease_s, parent, data, parent_rows)


def columns_of(offer: Offer) -> list[str]:
    """Return what does not come along: the routes or tracks, by name, in their order."""
    names = (ROUTES, *(track.name for track in offer.meta.tracks))
    return [name for name, data in zip(names, offer.data, strict=True) if data is None]


def column(record: Record, name: str) -> npt.NDArray[Any]:
    """Return the routes, or a track as it is stored."""
    return record.ids if name == ROUTES else record.tracks[name].buffer()


def objects_of(offers: Iterable[Offer]) -> list[str]:
    """Return the columns that records which travel together have, each an object of its own.

    So whoever reads routes moves nothing else. Both sides work this out from the offers.
    """
    return list(dict.fromkeys(name for offer in offers for name in columns_of(offer)))


def pack(offers: Sequence[Offer]) -> bytes:
    """Pickle offers here: Ray's pickler takes several times as long, and every put waits for it."""
    return pickle.dumps(offers, pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> list[Offer]:
    """Return what `pack` was given."""
    offers: list[Offer] = pickle.loads(packed)
    return offers
