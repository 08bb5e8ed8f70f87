"""Reading records from their shards: headers and references first, then all bytes at once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ObjectLostError, RayError

from serve_app.errors import KeyUnreadable, RoutesLost, StoreUnavailable
from serve_app.records import ALL_TRACKS, ROUTES, Record, RecordMeta, Track, Tracks
from serve_app.store.access.calls import ShardCalls, line
from serve_app.store.access.routing import KeyRouter
from serve_app.store.base import Meanwhile, Segments, TrackPart, Unreadable
from serve_app.store.keys import parse
from serve_app.store.outbox import Batch
from serve_app.store.owner.answers import (
    SMALL,
    Found,
    Place,
    Places,
    ReadAnswer,
    ids_of,
    unpack_described,
)
from serve_app.store.owner.directory import list_shards, this_node
from serve_app.store.snapshot import Entry, Page

_NO_TRACKS: Tracks = {}
_HERE_S = 2.0
"""How long objects of this node may take before they are asked for anew."""


class _Reading(NamedTuple):
    """What shards answered: each key's headers, small records' bytes and first batch; all refs.

    ``here`` tells that all of it lies on this node.
    """

    reads: list[tuple[str, Found, npt.NDArray[np.uint8], int]]
    refs: "list[ray.ObjectRef[Batch]]"
    here: bool
    unreadable: dict[str, Unreadable]


class ShardReader:
    """Reads what the shards of an application hold; from any thread."""

    def __init__(self, app: str, calls: ShardCalls, router: KeyRouter, timeout_s: float) -> None:
        self._app = app
        self._calls = calls
        self._router = router
        self._timeout_s = timeout_s

    def fetch(
        self,
        keys: Sequence[str],
        meanwhile: Meanwhile | None = None,
        tracks: Sequence[str] = (),
    ) -> list[Segments | Unreadable]:
        """See `RecordStore`."""
        columns = (ROUTES, *tracks)
        reading, batches = self._read_all(keys, columns, meanwhile)
        answers: dict[str, Segments | Unreadable] = {**reading.unreadable}
        for text, found, small, first in reading.reads:
            answers[text] = _segments(found, _Bytes(small, batches, first), columns)
        return [answers[text] for text in keys]

    def fetch_track(self, key: str, name: str) -> list[TrackPart] | Unreadable:
        """See `RecordStore`."""
        reading, batches = self._read_all([key], (name,))
        if key in reading.unreadable:
            return reading.unreadable[key]
        _, found, small, first = reading.reads[0]
        return _track_parts(found, _Bytes(small, batches, first), name)

    def _read_all(
        self, keys: Sequence[str], columns: Sequence[str], meanwhile: Meanwhile | None = None
    ) -> tuple[_Reading, list[Batch | Unreadable]]:
        """Ask the shards, then bring their objects here."""
        reading = self._read(keys, columns, meanwhile)
        batches = _get_here(reading.refs) if reading.here else None
        if batches is None:
            # Ray was once seen not to find an object of this very node, which one of several
            # threads had just let go of. So it is asked for by a new reference.
            reading = self._read(keys, columns) if reading.here else reading
            batches = _get_all(reading.refs, self._timeout_s)
        return reading, batches

    def _read(
        self, keys: Sequence[str], columns: Sequence[str], meanwhile: Meanwhile | None = None
    ) -> _Reading:
        """Ask the shards what the keys are made of."""
        reads: list[tuple[str, Found, npt.NDArray[np.uint8], int]] = []
        refs: list[ray.ObjectRef[Batch]] = []
        here = True

        def receive(texts: list[str], reply: ReadAnswer) -> dict[str, Unreadable]:
            nonlocal here
            here &= self.is_local(texts[0])
            unreadable: dict[str, Unreadable] = {}
            for text, found in zip(texts, reply.found, strict=True):
                if isinstance(found, KeyUnreadable):
                    unreadable[text] = found
                else:
                    reads.append((text, found, reply.small, len(refs)))
            refs.extend(reply.refs)
            return unreadable

        unreadable = self._router.ask(
            keys, lambda shard, texts: shard.read.remote(texts, columns), receive, meanwhile
        )
        return _Reading(reads, refs, here, unreadable)

    def describe(self, keys: Sequence[str]) -> list[list[RecordMeta] | Unreadable]:
        """See `RecordStore`."""
        answers: dict[str, list[RecordMeta] | Unreadable] = {}

        def receive(texts: list[str], reply: bytes) -> dict[str, Unreadable]:
            chains = dict(zip(texts, unpack_described(reply), strict=True))
            answers.update(
                {text: chain for text, chain in chains.items() if isinstance(chain, list)}
            )
            return {text: why for text, why in chains.items() if not isinstance(why, list)}

        unreadable = self._router.ask(
            keys, lambda shard, texts: shard.describe.remote(texts), receive
        )
        answers.update(unreadable)
        return [answers[text] for text in keys]

    def is_local(self, key: str) -> bool:
        """See `RecordStore`: on this process's node."""
        return parse(key, self._app).shard == this_node()

    def pages(self, tag: str | None) -> Iterator[tuple[list[Entry], list[Record]]]:
        """Yield everything that the shards hold, or what a tag needs, some records at a time."""
        for name in list_shards(self._app):
            first: int | None = 0
            while first is not None:
                page, read = self._page(name, tag, first)
                batches = _get_all(read.refs, self._timeout_s)
                records: list[Record] = []
                for found in read.found:
                    if isinstance(found, KeyUnreadable):
                        raise found
                    segments = _segments(
                        found, _Bytes(read.small, batches, 0), (ROUTES, *page.tracks)
                    )
                    if not isinstance(segments, list):
                        raise segments
                    records += segments
                if page.entries:
                    yield page.entries, records
                first = page.next

    def _page(self, shard: str, tag: str | None, first: int) -> tuple[Page, ReadAnswer]:
        reply = self._calls.ask({shard: []}, lambda actor, _: actor.page.remote(tag, first))[shard]
        if isinstance(reply, RayError):
            raise StoreUnavailable(f"shard {shard} does not answer: {line(reply)}")
        page, read = reply
        return page, read


def _get_here(refs: "list[ray.ObjectRef[Batch]]") -> list[Batch | Unreadable] | None:
    """Return objects that lie on this node; None if they do not come soon, whatever the reason."""
    try:
        return list(ray.get(refs, timeout=_HERE_S))
    except RayError:
        return None


def _get_all(refs: "list[ray.ObjectRef[Batch]]", timeout_s: float) -> list[Batch | Unreadable]:
    """Bring all objects here at once, from wherever they are.

    They are waited for first: a get that waits would hold up those of other threads.
    """
    if not refs:
        return []
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=True)
    if len(ready) == len(refs):
        try:
            return list(ray.get(refs))
        except RayError:
            pass  # one of them is lost: find out which
    arrived = set(ready)
    late = StoreUnavailable(f"bytes did not arrive within {timeout_s} s")
    return [_get_one(ref) if ref in arrived else late for ref in refs]


def _get_one(ref: "ray.ObjectRef[Batch]") -> Batch | Unreadable:
    try:
        return ray.get(ref, timeout=1)
    except ObjectLostError:
        return RoutesLost("the node that held the bytes is gone")
    except RayError as error:
        return StoreUnavailable(f"bytes did not arrive: {line(error)}")


class _Lost(Exception):
    """A column's object did not arrive."""

    def __init__(self, why: Unreadable) -> None:
        super().__init__(str(why))
        self.why = why


class _Bytes(NamedTuple):
    """The bytes of one shard's answer; its own batches begin at number ``first``."""

    small: npt.NDArray[np.uint8]
    batches: list[Batch | Unreadable]
    first: int

    def at(self, place: Place) -> npt.NDArray[Any]:
        """Return a column that came in an object; raise `_Lost` if that did not come."""
        number, index = place
        batch = self.batches[self.first + number]
        if not isinstance(batch, list):
            raise _Lost(batch)
        return batch[index]

    def track(self, meta: RecordMeta, name: str, place: Place | None) -> Track | None:
        """Return a record's track, None if it has none of that name."""
        if place is None:
            return None
        header = meta.track(name)
        assert header is not None
        if place[0] == SMALL:
            end = place[1] + header.nbytes(meta.rows)
            return header.over(self.small[place[1] : end], meta.rows)
        return header.over(self.at(place), meta.rows)


def _segments(found: Found, of: _Bytes, columns: Sequence[str]) -> Segments | Unreadable:
    """Join headers and bytes; ``columns`` begin with the routes."""
    segments: Segments = []
    small, names = of.small, tuple(columns[1:])
    try:
        for meta, places, rows in found:
            place = places[0]
            assert place is not None
            ids = ids_of(meta, small, place[1]) if place[0] == SMALL else of.at(place)
            if names:
                own = [track.name for track in meta.tracks] if names == ALL_TRACKS else names
                record = Record(meta, ids, _tracks(meta, own, places[1:], of))
            else:
                record = Record(meta, ids, _NO_TRACKS)
            segments.append(record if rows == meta.rows else record.first(rows))
    except _Lost as lost:
        return lost.why
    return segments


def _tracks(meta: RecordMeta, names: Sequence[str], places: Places, of: _Bytes) -> Tracks:
    found = {name: of.track(meta, name, place) for name, place in zip(names, places, strict=True)}
    return {name: track for name, track in found.items() if track is not None}


def _track_parts(found: Found, of: _Bytes, name: str) -> list[TrackPart] | Unreadable:
    parts: list[TrackPart] = []
    try:
        for meta, places, rows in found:
            track = of.track(meta, name, places[0])
            parts.append((meta.first(rows), None if track is None else track.part(0, rows)))
    except _Lost as lost:
        return lost.why
    return parts
