"""What a shard answers to a read: headers and places of the bytes, each object once."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import KeyUnreadable
from serve_app.records import ALL_TRACKS, ROUTES, Ids, RecordMeta, TrackMeta
from serve_app.store.owner.holdings import Column, Payload
from serve_app.store.owner.ledger import Link

if TYPE_CHECKING:
    import ray

    from serve_app.store.outbox import Batch

Place = tuple[int, int]
"""The number of the ref and the index in its list; of few bytes `SMALL` and an offset."""
Places = tuple[Place | None, ...]
"""Where each column is that was asked for; None for one that the record does not have."""
SMALL = -1
_ALIGNED = 8
_ROUTES_ALONE = (ROUTES,)
_HEADER = RecordMeta._fields.index("tracks")


FoundRecord = tuple[RecordMeta, Places, int]
"""A record's header, where its columns are, and how many of its rows are meant."""
Found = list[FoundRecord]
"""A key's segments."""
_Packed = tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...], Places, int]
Described = list[list[RecordMeta] | KeyUnreadable]
"""The headers that keys are made of, or why they have none."""


def pack_described(answers: Described) -> bytes:
    """Pickle headers here: Ray's pickler takes ten times as long over many of them."""
    return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)


def unpack_described(packed: bytes) -> Described:
    """Return what `pack_described` was given."""
    answers: Described = pickle.loads(packed)
    return answers


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """One answer for a whole batch of keys: what each is made of, and every object once.

    ``packed`` is pickled here, because Ray's pickler takes ten times as long over many headers,
    and as plain tuples, which take half as long as named ones. ``small`` has the bytes of all
    small records in one array, which many of them reach the reader in without being copied.
    """

    packed: bytes
    small: npt.NDArray[np.uint8]
    refs: "list[ray.ObjectRef[Batch]]"

    @property
    def found(self) -> list[Found | KeyUnreadable]:
        """What each key is made of, or why it has nothing."""
        chains: list[list[_Packed] | KeyUnreadable] = pickle.loads(self.packed)
        return [
            [
                (_with_tracks(header, tracks) if tracks else RecordMeta(*header), places, rows)
                for header, tracks, places, rows in chain
            ]
            if isinstance(chain, list)
            else chain
            for chain in chains
        ]


def _with_tracks(header: tuple[Any, ...], tracks: tuple[tuple[Any, ...], ...]) -> RecordMeta:
    return RecordMeta(*header)._replace(tracks=tuple(TrackMeta(*track) for track in tracks))


class Collected:
    """Puts an answer together: each chain's headers, and every object once.

    ``columns`` are the routes or tracks that were asked for; headers are without their tracks
    where those were not.
    """

    def __init__(self, columns: Sequence[str] = _ROUTES_ALONE) -> None:
        self._columns = tuple(columns)
        self._routes_alone = self._columns == _ROUTES_ALONE
        self._all = self._columns == (ROUTES, *ALL_TRACKS)
        self._chains: list[list[_Packed] | KeyUnreadable] = []
        self._small: list[bytes] = []
        self._small_bytes = 0
        self._refs: list[ray.ObjectRef[Batch]] = []
        self._numbers: dict[int, int] = {}

    def add(self, chain: Sequence[Link[Payload]]) -> None:
        """Add one key's segments."""
        if self._routes_alone:
            self._chains.append(
                [
                    (meta[:_HEADER], (), (self._place(payload[0]),), rows)
                    for meta, payload, rows in chain
                ]
            )
            return
        self._chains.append([self._packed(link) for link in chain])

    def _packed(self, link: Link[Payload]) -> _Packed:
        meta, payload, rows = link
        if self._all:
            places: Places = tuple([self._place(column) for column in payload])
        else:
            names = (ROUTES, *(track.name for track in meta.tracks))
            by_name = dict(zip(names, payload, strict=True))
            places = tuple(
                self._place(by_name[name]) if name in by_name else None for name in self._columns
            )
        return meta[:_HEADER], tuple(map(tuple, meta.tracks)), places, rows

    def miss(self, why: KeyUnreadable) -> None:
        """Add a key that cannot be read."""
        self._chains.append(why)

    def answer(self) -> ReadAnswer:
        """Return everything that was added."""
        packed = pickle.dumps(self._chains, pickle.HIGHEST_PROTOCOL)
        small = np.frombuffer(b"".join([*self._small, bytes(_ALIGNED)]), np.uint8)
        return ReadAnswer(packed, small, self._refs)

    def _place(self, column: Column) -> Place:
        if isinstance(column, bytes):
            offset, padding = self._small_bytes, -len(column) % _ALIGNED
            self._small += (column, bytes(padding)) if padding else (column,)
            self._small_bytes += len(column) + padding
            return SMALL, offset
        blob = column.blob
        if (number := self._numbers.setdefault(id(blob), len(self._refs))) == len(self._refs):
            self._refs.append(blob.ref)
        return number, column.index


def ids_of(meta: RecordMeta, small: npt.NDArray[np.uint8], offset: int) -> Ids:
    """Return a small record's ids, a view that keeps all of its answer's ``small``."""
    shape = meta.rows, meta.layers, meta.top_k
    ids: Ids = np.ndarray(shape, meta.dtype, small.data, offset)
    return ids
