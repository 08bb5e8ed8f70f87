"""Reading records from their shards: headers and references first, then all bytes at once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ObjectLostError, RayError

from serve_app.errors import KeyUnreadable, RoutesLost, StoreUnavailable
from serve_app.records import Ids, Record, RecordMeta
from serve_app.store.access.calls import ShardCalls, line
from serve_app.store.access.routing import KeyRouter
from serve_app.store.base import Meanwhile, Segments, Unreadable
from serve_app.store.keys import parse
from serve_app.store.outbox import Batch
from serve_app.store.owner.answers import SMALL, Found, ReadAnswer, ids_of, unpack_described
from serve_app.store.owner.directory import list_shards, this_node
from serve_app.store.snapshot import Entry, Page

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
        self, keys: Sequence[str], meanwhile: Meanwhile | None = None
    ) -> list[Segments | Unreadable]:
        """See `RecordStore`."""
        reading = self._read(keys, meanwhile)
        batches = _get_here(reading.refs) if reading.here else None
        if batches is None:
            # Ray was once seen not to find an object of this very node, which one of several
            # threads had just let go of. So it is asked for by a new reference.
            reading = self._read(keys) if reading.here else reading
            batches = _get_all(reading.refs, self._timeout_s)
        answers: dict[str, Segments | Unreadable] = {**reading.unreadable}
        for text, found, small, first in reading.reads:
            answers[text] = _segments(found, small, batches, first)
        return [answers[text] for text in keys]

    def _read(self, keys: Sequence[str], meanwhile: Meanwhile | None = None) -> _Reading:
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
            keys, lambda shard, texts: shard.read.remote(texts), receive, meanwhile
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

    def pages(self, tag: str | None) -> Iterator[tuple[list[Entry], list[Ids]]]:
        """Yield everything that the shards hold, or what a tag needs, some records at a time."""
        for name in list_shards(self._app):
            first: int | None = 0
            while first is not None:
                page, read = self._page(name, tag, first)
                batches = _get_all(read.refs, self._timeout_s)
                arrays: list[Ids] = []
                for found in read.found:
                    if isinstance(found, KeyUnreadable):
                        raise found
                    segments = _segments(found, read.small, batches)
                    if not isinstance(segments, list):
                        raise segments
                    arrays.append(segments[0].ids)
                if page.entries:
                    yield page.entries, arrays
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


def _segments(
    found: Found,
    small: npt.NDArray[np.uint8],
    batches: list[Batch | Unreadable],
    first: int = 0,
) -> Segments | Unreadable:
    """Join headers and bytes; the answer's own batches begin at number ``first``."""
    segments: Segments = []
    for meta, (number, index) in found:
        if number == SMALL:
            segments.append(Record(meta, ids_of(meta, small, index)))
            continue
        batch = batches[first + number]
        if not isinstance(batch, list):
            return batch
        segments.append(Record(meta, batch[index]))
    return segments
