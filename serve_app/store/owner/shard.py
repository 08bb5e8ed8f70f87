"""One shard: a detached actor that owns the records produced on its node.

Who owns: the shard, from the moment a put is acknowledged. Who frees: `release`, or the sweep at
the end of a lease. Constructor arguments survive a restart of the process, its memory does not.
"""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from serve_app.config import StoreArgs
from serve_app.errors import (
    KeyUnreadable,
    RoutesLost,
    StoreError,
    StoreFull,
    StoreUnavailable,
    without_frames,
)
from serve_app.observe.event_log import log_event
from serve_app.records import ROUTES
from serve_app.store import outbox
from serve_app.store.door import OpenDoor
from serve_app.store.keys import verify
from serve_app.store.offers import Offer, objects_of, unpack
from serve_app.store.owner.answers import Collected, Described, ReadAnswer, pack_described
from serve_app.store.owner.epochs import Epochs
from serve_app.store.owner.holdings import DROP_AT_ONCE, Holdings, Piece, pieces_of
from serve_app.store.owner.metrics import ShardMetrics
from serve_app.store.owner.object_store import default_budget
from serve_app.store.owner.presence import is_served
from serve_app.store.snapshot import PAGE_RECORDS, Entry, Page
from serve_app.types import ShardStats

SWEEP_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What a shard says of itself, so that a foreign actor under its name is noticed.

    ``door`` is the address that processes on its node may use.
    """

    app: str
    shard: str
    epoch: int
    door: str | None


class Shard:
    """Runs as an asyncio actor; nothing in it blocks, so reads never stand behind puts."""

    def __init__(self, app: str, shard: str, secret: bytes, args: StoreArgs) -> None:
        self._epochs = Epochs(app, shard, secret)
        self._args = args
        self._holdings = Holdings(args.byte_budget or default_budget(shard))
        self._grants: dict[int, tuple[int, float]] = {}
        self._grant_numbers = itertools.count()
        self._metrics = ShardMetrics(app, shard)
        log_event("shard_started", app=app, shard=shard, epoch=f"{self._epochs.own:016x}")
        loop = asyncio.get_running_loop()
        self._door = OpenDoor({"take_small": self.take_small, "describe": self.describe})
        self._address = loop.create_task(self._door.open())
        self._upkeep = loop.create_task(self._keep_up())

    async def identity(self) -> ShardIdentity:
        """Say who this is."""
        address = await self._address
        return ShardIdentity(self._epochs.app, self._epochs.shard, self._epochs.own, address)

    async def configure(self, args: StoreArgs) -> None:
        """Take new settings; a smaller budget holds for new puts only."""
        self._args = args
        self._holdings.budget.total = args.byte_budget or default_budget(self._epochs.shard)

    async def take_small(self, packed: bytes) -> list[str | StoreError]:
        """Keep records that brought their bytes along; ``packed`` are pickled offers."""
        begun = time.monotonic()
        offers = unpack(packed)
        await self._reserve(sum(offer.meta.nbytes for offer in offers))
        kept = [self._keep(offer, {}) for offer in offers]
        self._metrics.took("put", time.monotonic() - begun)
        return kept

    async def pull(
        self, producer: ActorHandle[Any], number: int, packed: bytes
    ) -> list[str | StoreError]:
        """Fetch batch ``number`` from the producer's outbox and keep its records.

        Reserves first, so a full store pins nothing. The references are this actor's own;
        ``packed`` are pickled offers.
        """
        begun = time.monotonic()
        offers = unpack(packed)
        total = sum(offer.meta.nbytes for offer in offers)
        await self._reserve(total)
        names = objects_of(offers)
        refs: list[Any] = producer.__ray_call__.options(num_returns=len(names) + 1).remote(
            outbox.give, number
        )
        try:
            await asyncio.wait_for(refs[-1], self._args.call_timeout_s)
        except BaseException as error:
            self._holdings.budget.give(total)
            if isinstance(error, (RayError, TimeoutError)):
                raise StoreUnavailable(f"the producer gave no records: {error}") from None
            raise
        pieces = pieces_of(offers, dict(zip(names, refs[:-1], strict=True)))
        kept = [self._keep(offer, each) for offer, each in zip(offers, pieces, strict=True)]
        self._metrics.took("put", time.monotonic() - begun)
        return kept

    async def reserve(self, nbytes: int) -> int:
        """Grant room for one record that will be sent; it lapses after the put timeout."""
        await self._reserve(nbytes)
        grant = next(self._grant_numbers)
        self._grants[grant] = (nbytes, time.monotonic() + self._args.put_timeout_s)
        return grant

    async def take(self, grant: int, offer: Offer, columns: list[npt.NDArray[Any]]) -> str:
        """Keep a record that was sent under a grant (one more copy than `pull`)."""
        if grant not in self._grants:
            raise StoreUnavailable("the room granted for this record lapsed before it arrived")
        nbytes, _ = self._grants.pop(grant)
        try:
            refs = [await asyncio.to_thread(ray.put, [column]) for column in columns]
        except BaseException:
            self._holdings.budget.give(nbytes)
            raise
        (pieces,) = pieces_of([offer], dict(zip(objects_of([offer]), refs, strict=True)))
        kept = self._keep(offer, pieces)
        if isinstance(kept, StoreError):
            raise kept
        return kept

    async def read(self, keys: Sequence[str], columns: Sequence[str] = (ROUTES,)) -> ReadAnswer:
        """Return what the keys are made of, routes or tracks; renews their leases."""
        begun = time.monotonic()
        collected = Collected(columns)
        for text in keys:
            try:
                collected.add(self._holdings.ledger.read(self._find(text), begun))
            except KeyUnreadable as why:
                collected.miss(without_frames(why))
                continue
            self._holdings.counts.gets += 1
        self._metrics.took("read", time.monotonic() - begun)
        return collected.answer()

    async def describe(self, keys: Sequence[str]) -> bytes:
        """Return the headers that the keys are made of, packed by `pack_described`."""
        answers: Described = []
        for text in keys:
            try:
                answers.append(self._holdings.ledger.describe(self._find(text)))
            except KeyUnreadable as why:
                answers.append(without_frames(why))
        return pack_described(answers)

    async def page(self, tag: str | None, first: int) -> tuple[Page, ReadAnswer]:
        """Return some records, live or needed by live ones, from a sequence number on."""
        ledger = self._holdings.ledger
        if tag is None:
            seqs, more = ledger.held(first, PAGE_RECORDS)
        else:
            family = [seq for seq in ledger.family(tag) if seq >= first]
            seqs = family[:PAGE_RECORDS]
            more = family[PAGE_RECORDS] if len(family) > PAGE_RECORDS else None
        entries: list[Entry] = []
        found = [(seq, held) for seq in seqs if (held := ledger.entry(seq)) is not None]
        tracks = {track.name: None for _, held in found for track in held.meta.tracks}
        collected = Collected((ROUTES, *tracks))
        for seq, held in found:
            above = None if held.parent is None else self._epochs.sign(held.parent)
            key, live = self._epochs.sign(seq), ledger.is_live(seq)
            entries.append(
                Entry(key, above, held.tag, held.lease_s, live, held.meta, held.parent_rows)
            )
            collected.add([(held.meta, held.payload, held.meta.rows)])
        return Page(entries, more, tuple(tracks)), collected.answer()

    async def adopt(self, secret: bytes, new_keys: Mapping[str, str]) -> None:
        """Let restored records answer to the keys that they had when they were saved."""
        for old_key, new_key in new_keys.items():
            old = verify(old_key, self._epochs.app, secret)
            self._epochs.adopt(old, secret, self._epochs.find(new_key))

    async def adopted(self) -> dict[int, bytes]:
        """Return the epochs that this process took over, and what signed their keys."""
        return self._epochs.adopted

    async def release(self, keys: Sequence[str], tag: str | None, below: int | None = None) -> int:
        """End keys, all under a tag, or all of weights before version ``below``; idempotent."""
        ledger = self._holdings.ledger
        ended = sum(ledger.release(seq) for seq in self._chosen(keys, tag))
        first: int | None = None if below is None else 0
        while first is not None and below is not None:
            older, first = ledger.older(below, first)
            ended += sum(ledger.release(seq) for seq in older)
            await asyncio.sleep(0)
        self._holdings.collect()
        return ended

    async def renew(self, keys: Sequence[str], tag: str | None, lease_s: float) -> int:
        """Let leases end ``lease_s`` seconds from now."""
        chosen, now = self._chosen(keys, tag), time.monotonic()
        for seq in chosen:
            self._holdings.ledger.renew(seq, now, lease_s)
        return len(chosen)

    async def retag(self, keys: Sequence[str], tag: str) -> int:
        """Move keys under another tag."""
        chosen = self._chosen(keys, None)
        for seq in chosen:
            self._holdings.ledger.tag(seq, tag)
        return len(chosen)

    async def stats(self) -> ShardStats:
        """Count what is held and what happened."""
        reserved = sum(nbytes for nbytes, _ in self._grants.values())
        return self._holdings.stats(self._epochs.shard, reserved)

    async def _reserve(self, nbytes: int) -> None:
        try:
            await self._holdings.reserve(nbytes, self._args.put_timeout_s)
        except StoreFull as why:
            log_event("store_full", app=self._epochs.app, shard=self._epochs.shard, why=str(why))
            raise

    def _keep(self, offer: Offer, pieces: Mapping[str, Piece]) -> str | StoreError:
        names = (ROUTES, *(track.name for track in offer.meta.tracks))
        payload = tuple(
            pieces[name] if data is None else data
            for name, data in zip(names, offer.data, strict=True)
        )
        try:
            parent = None if offer.parent is None else self._find(offer.parent)
        except KeyUnreadable as why:
            self._holdings.drop(payload)
            return without_frames(why)
        try:
            seq = self._holdings.keep(offer, payload, self._args.lease_s, parent)
        except KeyUnreadable as why:
            return without_frames(why)
        return self._epochs.sign(seq)

    def _find(self, text: str) -> int:
        try:
            return self._epochs.find(text)
        except RoutesLost:
            self._holdings.counts.lost += 1
            raise

    def _chosen(self, keys: Sequence[str], tag: str | None) -> list[int]:
        chosen = [] if tag is None else self._holdings.ledger.tagged(tag)
        for text in keys:
            try:
                chosen.append(self._epochs.find(text))
            except RoutesLost:
                continue
        return chosen

    async def _keep_up(self) -> None:
        """Sweep leases, return lapsed grants, report; leave when nobody needs this shard."""
        empty_since = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = time.monotonic()
            await self._sweep(now)
            self._metrics.report(await self.stats())
            if self._holdings.budget.used:
                empty_since = now
            if now - empty_since > self._args.leave_after_s:
                if not await is_served(self._epochs.app) and not self._holdings.budget.used:
                    self._door.close()  # Ray refuses calls from now on, the door would not
                    log_event("shard_leaves", app=self._epochs.app, shard=self._epochs.shard)
                    ray.actor.exit_actor()  # type: ignore[no-untyped-call]
                empty_since = now

    async def _sweep(self, now: float) -> None:
        swept = 0
        for swept, _ in enumerate(self._holdings.ledger.expire(now), 1):
            if swept % DROP_AT_ONCE == 0:
                await asyncio.sleep(0)
        if swept:
            log_event("expired", app=self._epochs.app, shard=self._epochs.shard, keys=swept)
        for _ in iter(self._holdings.collect, False):
            await asyncio.sleep(0)
        for grant in [grant for grant, (_, end) in self._grants.items() if end < now]:
            self._holdings.budget.give(self._grants.pop(grant)[0])
