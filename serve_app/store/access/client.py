"""Puts and gets: the way from any process to the shards, one batched call a shard."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.config import StoreArgs
from serve_app.errors import KeyUnreadable, StoreError, StoreUnavailable
from serve_app.records import Record, RecordMeta
from serve_app.store import outbox
from serve_app.store.access.calls import GONE, Actor, ShardCalls, line, translate
from serve_app.store.access.own_shard import OwnShard
from serve_app.store.access.producer import Producer
from serve_app.store.access.reads import ShardReader
from serve_app.store.access.routing import KeyRouter
from serve_app.store.base import Meanwhile, Segments, TrackPart, Unreadable
from serve_app.store.keys import parse
from serve_app.store.offers import Offer, column, columns_of, objects_of, offer_of, pack
from serve_app.store.owner.answers import unpack_described
from serve_app.store.owner.directory import STORE, Settings, find_directory, list_shards, this_node
from serve_app.store.protocol import ask_protocol, check_protocol
from serve_app.store.snapshot import Entry
from serve_app.types import ShardStats, StoreStats

_SOON_S = 1.0  # a shard on this node that takes longer is in trouble


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
        self._reads = ShardReader(app, self._calls, self._router, settings.args.call_timeout_s)
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
        parent_rows: int | None = None,
    ) -> str:
        """See `RecordStore`."""
        offer = offer_of(record, tag, lease_s, parent, parent_rows)
        if offer.is_whole:
            packed = pack([offer])
            return _one(self._own.ask(lambda shard: shard.take_small.remote(packed), self._put_s))
        nbytes = record.meta.nbytes
        grant = self._own.ask(lambda shard: shard.reserve.remote(nbytes), self._put_s)
        columns = [column(record, name) for name in columns_of(offer)]
        return str(
            self._own.ask(
                lambda shard: shard.take.remote(grant, offer, columns), self.args.call_timeout_s
            )
        )

    async def aput(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
        parent_rows: int | None = None,
    ) -> str:
        """See `RecordStore`."""
        if self._me is None:
            return await asyncio.to_thread(
                self.put,
                record,
                tag=tag,
                lease_s=lease_s,
                parent=parent,
                parent_rows=parent_rows,
            )
        if self._batches is None:
            budget = (self.args.byte_budget or 1 << 62) // 8
            self._batches = Producer(self._send, budget)
        offer = offer_of(record, tag, lease_s, parent, parent_rows)
        return await self._batches.put(offer, record)

    def release(
        self,
        keys: Sequence[str] = (),
        *,
        tag: str | None = None,
        weight_version_below: int | None = None,
    ) -> int:
        """See `RecordStore`."""
        below = weight_version_below
        return self._change(
            keys,
            tag,
            lambda shard, texts: shard.release.remote(texts, tag, below),
            everywhere=below is not None,
        )

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

    def fetch(
        self,
        keys: Sequence[str],
        meanwhile: Meanwhile | None = None,
        tracks: Sequence[str] = (),
    ) -> list[Segments | Unreadable]:
        """See `RecordStore`."""
        return self._reads.fetch(keys, meanwhile, tracks)

    def fetch_track(self, key: str, name: str) -> list[TrackPart] | Unreadable:
        """See `RecordStore`."""
        return self._reads.fetch_track(key, name)

    def describe(self, keys: Sequence[str]) -> list[list[RecordMeta] | Unreadable]:
        """See `RecordStore`."""
        return self._reads.describe(keys)

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

    def pages(self, tag: str | None) -> Iterator[tuple[list[Entry], list[Record]]]:
        """See `ShardReader`."""
        return self._reads.pages(tag)

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
        """See `RecordStore`."""
        return self._reads.is_local(key)

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
        small = [offer for offer, _ in batch if offer.is_whole]
        big = [(offer, record) for offer, record in batch if not offer.is_whole]
        answers: dict[int, str | StoreError] = {}
        if small:
            kept = await self._own.tell("take_small", pack(small), self._put_s)
            answers.update(zip(map(id, small), kept, strict=True))
        if big:
            offers = [offer for offer, _ in big]
            number = outbox.leave(
                [
                    [column(record, name) for offer, record in big if name in columns_of(offer)]
                    for name in objects_of(offers)
                ]
            )
            packed = pack(offers)
            try:
                kept = await self._own.ask_async(
                    lambda shard: shard.pull.remote(self._me, number, packed), self._put_s
                )
            finally:
                outbox.withdraw(number)
            answers.update(zip(map(id, offers), kept, strict=True))
        return [answers[id(offer)] for offer, _ in batch]

    def _change(
        self,
        keys: Sequence[str],
        tag: str | None,
        call: "Callable[[Actor, list[str]], ray.ObjectRef[int]]",
        everywhere: bool = False,
    ) -> int:
        groups, foreign = self._router.by_shard(keys)
        if foreign:
            raise next(iter(foreign.values()))
        if tag is not None or everywhere:
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


def connect(app: str, producer: Actor | None = None, timeout_s: float = 10.0) -> ShardStore:
    """Find an application's store.

    Raises `StoreUnavailable` if none runs in this cluster, and `StoreError` if it is one of another
    version of r3serve.
    """
    try:
        directory = find_directory(app)
        check_protocol(ray.get(ask_protocol(directory, STORE, app), timeout=timeout_s), STORE, app)
        answer: Any = ray.get(directory.settings.remote(), timeout=timeout_s)
    except RayError as error:
        raise StoreUnavailable(f"the store of {app!r} does not answer: {line(error)}") from None
    settings: Settings = answer
    return ShardStore(app, settings, producer)
