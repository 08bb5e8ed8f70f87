"""Records on their way into a shard: everything but the bytes, or the bytes too if they are few."""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from serve_app.records import ROUTES, Record, RecordMeta, TrackMeta, as_read

SMALL_BYTES = 64 << 10
_TRACKS = RecordMeta._fields.index("tracks")


@dataclass(frozen=True, slots=True)
class Offer:
    """A record on its way into a shard; ``data`` are the routes and the tracks in their order.

    Those of a small record come along; None stands for what is fetched or sent apart. Of the
    ``parent``'s sequence the first ``parent_rows`` are the record's beginning, all where that is
    None.
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
    """Offer a record of up to `SMALL_BYTES` with its bytes, a larger one without.

    Not with its tokens alone either: those of a few records together make a call so large that
    Ray writes it into its object store.
    """
    record = as_read(record)
    meta = record.meta
    data: tuple[bytes | None, ...]
    if meta.nbytes > SMALL_BYTES:
        data = (None,) * (1 + len(meta.tracks))
    else:
        tracks = [record.tracks[track.name].tobytes() for track in meta.tracks]
        data = (record.ids.tobytes(), *tracks)
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
    """Pickle offers here: Ray's pickler takes several times as long, and every put waits for it.

    As plain tuples, which take half as long as named ones and objects.
    """
    plain = [
        (
            offer.meta[:_TRACKS],
            [tuple(track) for track in offer.meta.tracks],
            offer.tag,
            offer.lease_s,
            offer.parent,
            offer.data,
            offer.parent_rows,
        )
        for offer in offers
    ]
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> list[Offer]:
    """Return what `pack` was given."""
    return [
        Offer(RecordMeta._make((*header, tuple([TrackMeta(*track) for track in tracks]))), *rest)
        for header, tracks, *rest in pickle.loads(packed)
    ]
