"""Puts and gets: the way from any process to the shards, one batched call a shard."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayError

from serve_app.config import StoreArgs
from serve_app.errors import KeyUnreadable, StoreError, StoreUnavailable
from serve_app.records import Ids, Record, RecordMeta
from serve_app.store import outbox
from serve_app.store.answers import SMALL, Found, ReadAnswer, ids_of, unpack_described
from serve_app.store.base import Meanwhile, Segments, Unreadable
from serve_app.store.calls import GONE, Actor, ShardCalls, get_all, get_here, line, translate
from serve_app.store.directory import Settings, find_directory, list_shards, this_node
from serve_app.store.keys import parse
from serve_app.store.offers import Offer, offer_of, pack
from serve_app.store.own_shard import OwnShard
from serve_app.store.producer import Producer
from serve_app.store.routing import KeyRouter
from serve_app.store.snapshot import Entry, Page
from serve_app.types import ShardStats, StoreStats

_SOON_S = 1.0  # a shard on this node that takes longer is in trouble


class _Reading(NamedTuple):
    """What shards answered: each key's headers, small records' bytes and first batch; all refs.

    ``here`` tells that all of it lies on this node.
    """

    reads: list[tuple[str, Found, npt.NDArray[np.uint8], int]]
    refs: "list[ray.ObjectRef[outbox.Batch]]"
    here: bool
    unreadable: dict[str, Unreadable]


class ShardStore:
    """`RecordStore` over the application's shards.

    ``producer`` is the calling process's own asyncio actor: with it the shard pulls records out
    of this process (one object-store write); without, `put` reserves and sends (two).
    `aput` and `adescribe` are for one event loop.
    """

    def __init__(self, app: str, settings: Settings, producer: Actor | None = None) -> None:
        self.app = app
        self._settings = settings
        self._me = producer
        self._own = OwnShard(app, settings)
        self._calls = ShardCalls(app, settings.args.call_timeout_s)
        self._router = KeyRouter(app, self._calls)
        self._batches: Producer | None = None

    @property
    def secret(self) -> bytes:
        """What signs this application's keys."""
        return self._settings.secret

    @property
    def args(self) -> StoreArgs:
        """The store's settings when this process connected."""
        return self._settings.args

    def put(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
    ) -> str:
        """See `RecordStore`."""
        offer = offer_of(record, tag, lease_s, parent)
        if offer.data is not None:
            packed = pack([offer])
            return _one(self._own.ask(lambda shard: shard.take_small.remote(packed), self._put_s))
        nbytes = record.meta.nbytes
        grant = self._own.ask(lambda shard: shard.reserve.remote(nbytes), self._put_s)
        return str(
            self._own.ask(
                lambda shard: shard.take.remote(grant, offer, record.ids), self.args.call_timeout_s
            )
        )

    async def aput(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
    ) -> str:
        """See `RecordStore`."""
        if self._me is None:
            return await asyncio.to_thread(
                self.put, record, tag=tag, lease_s=lease_s, parent=parent
            )
        if self._batches is None:
            budget = (self.args.byte_budget or 1 << 62) // 8
            self._batches = Producer(self._send, budget)
        return await self._batches.put(offer_of(record, tag, lease_s, parent), record)

    def fetch(
        self, keys: Sequence[str], meanwhile: Meanwhile | None = None
    ) -> list[Segments | Unreadable]:
        """See `RecordStore`."""
        reading = self._read(keys, meanwhile)
        batches = get_here(reading.refs) if reading.here else None
        if batches is None:
            # Ray was once seen not to find an object of this very node, which one of several
            # threads had just let go of. So it is asked for by a new reference.
            reading = self._read(keys) if reading.here else reading
            batches = get_all(reading.refs, self.args.call_timeout_s)
        answers: dict[str, Segments | Unreadable] = {**reading.unreadable}
        for text, found, small, first in reading.reads:
            answers[text] = _segments(found, small, batches, first)
        return [answers[text] for text in keys]

    def _read(self, keys: Sequence[str], meanwhile: Meanwhile | None = None) -> "_Reading":
        """Ask the shards what the keys are made of."""
        reads: list[tuple[str, Found, npt.NDArray[np.uint8], int]] = []
        refs: list[ray.ObjectRef[outbox.Batch]] = []
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

    def release(self, keys: Sequence[str] = (), *, tag: str | None = None) -> int:
        """See `RecordStore`."""
        return self._change(keys, tag, lambda shard, texts: shard.release.remote(texts, tag))

    def renew(self, keys: Sequence[str] = (), *, tag: str | None = None, lease_s: float) -> int:
        """See `RecordStore`."""
        return self._change(keys, tag, lambda shard, texts: shard.renew.remote(texts, tag, lease_s))

    def retag(self, keys: Sequence[str], tag: str) -> int:
        """See `RecordStore`."""
        return self._change(keys, None, lambda shard, texts: shard.retag.remote(texts, tag))

    def stats(self) -> StoreStats:
        """See `RecordStore`."""
        names = list_shards(self.app)
        replies = self._calls.ask(
            {name: [] for name in names}, lambda shard, _: shard.stats.remote()
        )
        answered = tuple(reply for reply in replies.values() if isinstance(reply, ShardStats))
        silent = [name for name in names if not isinstance(replies[name], ShardStats)]
        return StoreStats(answered, tuple(silent))

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

    async def adescribe(self, key: str) -> list[RecordMeta] | Unreadable:
        """See `RecordStore`. This node's shard is asked from the loop, others from a thread."""
        if self._is_mine(key):
            # What is no chain, or no answer, `describe` knows the meaning of.
            with suppress(StoreError, RayError):
                (chain,) = unpack_described(
                    await self._own.tell_if_open("describe", [key], _SOON_S)
                )
                if isinstance(chain, list):
                    return chain
        return (await asyncio.to_thread(self.describe, [key]))[0]

    def pages(self, tag: str | None) -> Iterator[tuple[list[Entry], list[Ids]]]:
        """Yield everything that the shards hold, or what a tag needs, some records at a time."""
        for name in list_shards(self.app):
            first: int | None = 0
            while first is not None:
                page, read = self._page(name, tag, first)
                batches = get_all(read.refs, self.args.call_timeout_s)
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

    def adopt(self, secret: bytes, new_keys: Mapping[str, str]) -> None:
        """Let records that were put here again answer to their old keys, signed by ``secret``."""
        epochs = sorted({parse(old_key, self.app).epoch for old_key in new_keys})
        timeout_s = self.args.call_timeout_s
        self._own.ask(lambda shard: shard.adopt.remote(secret, dict(new_keys)), timeout_s)
        try:
            directory = find_directory(self.app)
            ray.get(directory.adopt.remote(secret, epochs, this_node()), timeout=timeout_s)
        except RayError as error:
            raise translate(error, "directory") from None

    def is_local(self, key: str) -> bool:
        """See `RecordStore`: on this process's node."""
        return parse(key, self.app).shard == this_node()

    def _is_mine(self, key: str) -> bool:
        try:
            return self.is_local(key)
        except KeyUnreadable:
            return False

    @property
    def _put_s(self) -> float:
        """How long a put may take that waits for room."""
        return self.args.put_timeout_s + self.args.call_timeout_s

    async def _send(self, batch: Sequence[tuple[Offer, Record]]) -> list[str | StoreError]:
        """Send a batch of one event loop's records; small ones by value, the others pulled."""
        small = [offer for offer, _ in batch if offer.data is not None]
        big = [(offer, record) for offer, record in batch if offer.data is None]
        answers: dict[int, str | StoreError] = {}
        if small:
            kept = await self._own.tell("take_small", pack(small), self._put_s)
            answers.update(zip(map(id, small), kept, strict=True))
        if big:
            number = outbox.leave([record.ids for _, record in big])
            offers = [offer for offer, _ in big]
            packed = pack(offers)
            try:
                kept = await self._own.ask_async(
                    lambda shard: shard.pull.remote(self._me, number, packed), self._put_s
                )
            finally:
                outbox.withdraw(number)
            answers.update(zip(map(id, offers), kept, strict=True))
        return [answers[id(offer)] for offer, _ in batch]

    def _page(self, shard: str, tag: str | None, first: int) -> tuple[Page, ReadAnswer]:
        reply = self._calls.ask({shard: []}, lambda actor, _: actor.page.remote(tag, first))[shard]
        if isinstance(reply, RayError):
            raise StoreUnavailable(f"shard {shard} does not answer: {line(reply)}")
        page, read = reply
        return page, read

    def _change(
        self,
        keys: Sequence[str],
        tag: str | None,
        call: "Callable[[Actor, list[str]], ray.ObjectRef[int]]",
    ) -> int:
        groups, foreign = self._router.by_shard(keys)
        if foreign:
            raise next(iter(foreign.values()))
        if tag is not None:
            groups = {name: [] for name in list_shards(self.app)} | groups
        changed, keyed = self._change_in(groups, call)
        if keyed < len(set(keys)):
            again, _ = self._router.by_shard(self._router.restored(list(dict.fromkeys(keys))))
            changed += self._change_in(again, call)[0]
        return changed

    def _change_in(
        self,
        groups: dict[str, list[str]],
        call: "Callable[[Actor, list[str]], ray.ObjectRef[int]]",
    ) -> tuple[int, int]:
        """Return how many keys changed in all, and at the shards that were asked about keys."""
        changed, keyed = 0, 0
        for shard, reply in self._calls.ask(groups, call).items():
            if isinstance(reply, int):
                changed += reply
                keyed += reply if groups[shard] else 0
            elif not isinstance(reply, GONE):
                raise StoreUnavailable(f"shard {shard} does not answer: {line(reply)}")
        return changed, keyed


def _one(answers: list[str | StoreError]) -> str:
    if isinstance(answers[0], StoreError):
        raise answers[0]
    return answers[0]


def _segments(
    found: Found,
    small: npt.NDArray[np.uint8],
    batches: list[outbox.Batch | Unreadable],
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


def connect(app: str, producer: Actor | None = None, timeout_s: float = 10.0) -> ShardStore:
    """Find an application's store; raise `StoreUnavailable` if none runs in this cluster."""
    try:
        answer: Any = ray.get(find_directory(app).settings.remote(), timeout=timeout_s)
    except RayError as error:
        raise StoreUnavailable(f"the store of {app!r} does not answer: {line(error)}") from None
    return ShardStore(app, answer, producer)
