"""Puts and gets: the way from any process to the shards, one batched call a shard."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from serve_app.config import StoreArgs
from serve_app.errors import KeyUnreadable, StoreError, StoreUnavailable
from serve_app.records import Record, RecordMeta
from serve_app.store import outbox
from serve_app.store.base import Offer, Segments, Unreadable
from serve_app.store.calls import GONE, Actor, ShardCalls, get_all, line, translate
from serve_app.store.directory import Settings, find_directory, list_shards, open_shard, this_node
from serve_app.store.keys import parse
from serve_app.store.producer import Producer
from serve_app.store.shard import Found, ReadAnswer
from serve_app.types import ShardStats, StoreStats

SMALL_BYTES = 64 << 10


class ShardStore:
    """`RecordStore` over the application's shards.

    ``producer`` is the calling process's own asyncio actor: with it the shard pulls records out
    of this process (one object-store write); without, `put` reserves and sends (two).
    """

    def __init__(self, app: str, settings: Settings, producer: Actor | None = None) -> None:
        self._app = app
        self._settings = settings
        self._me = producer
        self._own_shard: Actor | None = None
        self._calls = ShardCalls(app, settings.args.call_timeout_s)
        self._batches: Producer | None = None

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
        offer = _offer(record, tag, lease_s, parent)
        shard = self._shard_here()
        if offer.data is not None:
            return _one(self._answer(shard.take_small.remote([offer]), waits=True))
        grant = self._answer(shard.reserve.remote(record.meta.nbytes), waits=True)
        return str(self._answer(shard.take.remote(grant, offer, record.ids)))

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
        return await self._batches.put(_offer(record, tag, lease_s, parent), record)

    def fetch(self, keys: Sequence[str]) -> list[Segments | Unreadable]:
        """See `RecordStore`."""
        answers: dict[str, Segments | Unreadable] = {}
        groups, answers_now = self._by_shard(keys)
        answers.update(answers_now)
        replies = self._calls.ask(groups, lambda shard, texts: shard.read.remote(texts))
        reads: list[tuple[str, Found]] = []
        refs: list[ray.ObjectRef[outbox.Batch]] = []
        for shard, texts in groups.items():
            reply = replies[shard]
            if not isinstance(reply, ReadAnswer):
                answers.update(self._calls.explain(texts, reply))
                continue
            for text, found in zip(texts, reply.found, strict=True):
                if isinstance(found, KeyUnreadable):
                    answers[text] = found
                else:
                    reads.append((text, _renumber(found, len(refs))))
            refs += reply.refs
        batches = get_all(refs, self.args.call_timeout_s)
        for text, found in reads:
            answers[text] = _segments(found, batches)
        return [answers[text] for text in keys]

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
        names = list_shards(self._app)
        replies = self._calls.ask(
            {name: [] for name in names}, lambda shard, _: shard.stats.remote()
        )
        answered = tuple(reply for reply in replies.values() if isinstance(reply, ShardStats))
        silent = [name for name in names if not isinstance(replies[name], ShardStats)]
        return StoreStats(answered, tuple(silent))

    def describe(self, keys: Sequence[str]) -> list[list[RecordMeta] | Unreadable]:
        """See `RecordStore`."""
        groups, foreign = self._by_shard(keys)
        answers: dict[str, list[RecordMeta] | Unreadable] = {**foreign}
        replies = self._calls.ask(groups, lambda shard, texts: shard.describe.remote(texts))
        for shard, texts in groups.items():
            if isinstance(reply := replies[shard], list):
                answers.update(zip(texts, reply, strict=True))
            else:
                answers.update(self._calls.explain(texts, reply))
        return [answers[text] for text in keys]

    def is_local(self, key: str) -> bool:
        """See `RecordStore`: on this process's node."""
        return parse(key, self._app).shard == this_node()

    def _shard_here(self) -> Actor:
        if self._own_shard is None:
            self._own_shard = open_shard(self._app, self._settings)
        return self._own_shard

    async def _shard_here_async(self) -> Actor:
        if self._own_shard is None:
            return await asyncio.to_thread(self._shard_here)
        return self._own_shard

    async def _send(self, batch: Sequence[tuple[Offer, Record]]) -> list[str | StoreError]:
        """Send a batch of one event loop's records; small ones by value, the others pulled."""
        small = [offer for offer, _ in batch if offer.data is not None]
        big = [(offer, record) for offer, record in batch if offer.data is None]
        shard = await self._shard_here_async()
        answers: dict[int, str | StoreError] = {}
        if small:
            kept = await self._answer_async(shard.take_small.remote(small))
            answers.update(zip(map(id, small), kept, strict=True))
        if big:
            number = outbox.leave([record.ids for _, record in big])
            offers = [offer for offer, _ in big]
            try:
                kept = await self._answer_async(shard.pull.remote(self._me, number, offers))
            finally:
                outbox.withdraw(number)
            answers.update(zip(map(id, offers), kept, strict=True))
        return [answers[id(offer)] for offer, _ in batch]

    async def _answer_async(self, ref: "ray.ObjectRef[Any]") -> list[str | StoreError]:
        timeout_s = self.args.put_timeout_s + self.args.call_timeout_s
        try:
            answer: list[str | StoreError] = await asyncio.wait_for(ref, timeout_s)
        except TimeoutError:
            raise StoreUnavailable(f"shard {this_node()} did not answer in {timeout_s} s") from None
        except RayError as error:
            self._own_shard = None
            raise translate(error, this_node()) from None
        return answer

    def _answer(self, ref: "ray.ObjectRef[Any]", waits: bool = False) -> Any:
        timeout_s = self.args.call_timeout_s + (self.args.put_timeout_s if waits else 0)
        try:
            return ray.get(ref, timeout=timeout_s)
        except RayError as error:
            self._own_shard = None
            raise translate(error, this_node()) from None

    def _by_shard(
        self, keys: Sequence[str]
    ) -> tuple[dict[str, list[str]], dict[str, KeyUnreadable]]:
        groups: dict[str, list[str]] = {}
        foreign: dict[str, KeyUnreadable] = {}
        for text in dict.fromkeys(keys):
            try:
                groups.setdefault(parse(text, self._app).shard, []).append(text)
            except KeyUnreadable as why:
                foreign[text] = why
        return groups, foreign

    def _change(
        self,
        keys: Sequence[str],
        tag: str | None,
        call: "Callable[[Actor, list[str]], ray.ObjectRef[int]]",
    ) -> int:
        groups, foreign = self._by_shard(keys)
        if foreign:
            raise next(iter(foreign.values()))
        if tag is not None:
            groups = {name: [] for name in list_shards(self._app)} | groups
        changed = 0
        for shard, reply in self._calls.ask(groups, call).items():
            if isinstance(reply, int):
                changed += reply
            elif not isinstance(reply, GONE):
                raise StoreUnavailable(f"shard {shard} does not answer: {line(reply)}")
        return changed


def _offer(record: Record, tag: str | None, lease_s: float | None, parent: str | None) -> Offer:
    small = record.meta.nbytes <= SMALL_BYTES
    return Offer(record.meta, tag, lease_s, parent, record.ids.tobytes() if small else None)


def _one(answers: list[str | StoreError]) -> str:
    if isinstance(answers[0], StoreError):
        raise answers[0]
    return answers[0]


def _renumber(found: Found, by: int) -> Found:
    return [
        (meta, where if isinstance(where, bytes) else (where[0] + by, where[1]))
        for meta, where in found
    ]


def _segments(found: Found, batches: list[outbox.Batch | Unreadable]) -> Segments | Unreadable:
    segments: Segments = []
    for meta, where in found:
        if isinstance(where, bytes):
            ids = np.frombuffer(where, meta.dtype).reshape(meta.rows, meta.layers, meta.top_k)
            segments.append(Record(meta, ids))
            continue
        batch = batches[where[0]]
        if not isinstance(batch, list):
            return batch
        segments.append(Record(meta, batch[where[1]]))
    return segments


def connect(app: str, producer: Actor | None = None, timeout_s: float = 10.0) -> ShardStore:
    """Find an application's store; raise `StoreUnavailable` if none runs in this cluster."""
    try:
        answer: Any = ray.get(find_directory(app).settings.remote(), timeout=timeout_s)
    except RayError as error:
        raise StoreUnavailable(f"the store of {app!r} does not answer: {line(error)}") from None
    return ShardStore(app, answer, producer)
