"""One shard: a detached actor that owns the records produced on its node.

Who owns: the shard, from the moment a put is acknowledged. Who frees: `release`, or the sweep at
the end of a lease. Constructor arguments survive a restart of the process, its memory does not:
each start draws a new epoch, and keys of an older one read as lost.
"""

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from serve_app.config import StoreArgs
from serve_app.errors import KeyUnreadable, RoutesLost, StoreError, StoreUnavailable
from serve_app.records import RecordMeta
from serve_app.store import outbox
from serve_app.store.base import Offer
from serve_app.store.budget import Budget
from serve_app.store.keys import Key, verify
from serve_app.store.ledger import Ledger
from serve_app.types import ShardStats

SWEEP_EVERY_S = 1.0
_DROP_AT_ONCE = 100


@dataclass(slots=True)
class Blob:
    """Arrays that were pulled together; their memory comes back when the last is dropped."""

    ref: "ray.ObjectRef[outbox.Batch]"
    nbytes: int
    needed: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One record's array in a blob."""

    blob: Blob
    index: int


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What a shard says of itself, so that a foreign actor under its name is noticed."""

    app: str
    shard: str
    epoch: int


Found = list[tuple[RecordMeta, bytes | tuple[int, int]]]
"""A key's segments: header and bytes, or header and (number of the ref, index in its list)."""


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """One answer for a whole batch of keys: what each is made of, and every object once."""

    found: list[Found | KeyUnreadable]
    refs: "list[ray.ObjectRef[outbox.Batch]]"


class Shard:
    """Runs as an asyncio actor; nothing in it blocks, so reads never stand behind puts."""

    def __init__(self, app: str, shard: str, secret: bytes, args: StoreArgs) -> None:
        self._identity = ShardIdentity(app, shard, secrets.randbits(63))
        self._secret = secret
        self._args = args
        self._budget = Budget(args.byte_budget or default_budget(shard))
        self._ledger: Ledger[bytes | Piece] = Ledger()
        self._grants: dict[int, tuple[int, float]] = {}
        self._grant_numbers = itertools.count()
        self._to_drop: deque[bytes | Piece] = deque()
        self._counts = dict.fromkeys(("puts", "gets", "full"), 0)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def identity(self) -> ShardIdentity:
        """Say who this is."""
        return self._identity

    async def configure(self, args: StoreArgs) -> None:
        """Take new settings; a smaller budget holds for new puts only."""
        self._args = args
        self._budget.total = args.byte_budget or default_budget(self._identity.shard)

    async def take_small(self, offers: Sequence[Offer]) -> list[str | StoreError]:
        """Keep records that brought their bytes along."""
        total = sum(offer.meta.nbytes for offer in offers)
        await self._reserve(total)
        return [self._keep(offer, offer.data) for offer in offers if offer.data is not None]

    async def pull(
        self, producer: ActorHandle[Any], number: int, offers: Sequence[Offer]
    ) -> list[str | StoreError]:
        """Fetch batch ``number`` from the producer's outbox and keep its records.

        Reserves first, so a full store pins nothing. The reference is this actor's own.
        """
        total = sum(offer.meta.nbytes for offer in offers)
        await self._reserve(total)
        blob_ref: ray.ObjectRef[outbox.Batch]
        done: ray.ObjectRef[None]
        blob_ref, done = producer.__ray_call__.options(num_returns=2).remote(outbox.give, number)
        try:
            await asyncio.wait_for(done, self._args.call_timeout_s)
        except BaseException as error:
            self._budget.give(total)
            if isinstance(error, (RayError, TimeoutError)):
                raise StoreUnavailable(f"the producer gave no records: {error}") from None
            raise
        blob = Blob(blob_ref, total, len(offers))
        return [self._keep(offer, Piece(blob, index)) for index, offer in enumerate(offers)]

    async def reserve(self, nbytes: int) -> int:
        """Grant room for one record that will be sent; it lapses after the put timeout."""
        await self._reserve(nbytes)
        grant = next(self._grant_numbers)
        self._grants[grant] = (nbytes, time.monotonic() + self._args.put_timeout_s)
        return grant

    async def take(self, grant: int, offer: Offer, ids: npt.NDArray[Any]) -> str:
        """Keep a record that was sent under a grant (one more copy than `pull`)."""
        if grant not in self._grants:
            raise StoreUnavailable("the room granted for this record lapsed before it arrived")
        nbytes, _ = self._grants.pop(grant)
        try:
            ref = await asyncio.to_thread(ray.put, [ids])
        except BaseException:
            self._budget.give(nbytes)
            raise
        kept = self._keep(offer, Piece(Blob(ref, nbytes, 1), 0))
        if isinstance(kept, StoreError):
            raise kept
        return kept

    async def read(self, keys: Sequence[str]) -> ReadAnswer:
        """Return what the keys are made of; renews their leases."""
        now, numbers = time.monotonic(), dict[int, int]()
        found: list[Found | KeyUnreadable] = []
        refs: list[ray.ObjectRef[outbox.Batch]] = []
        for text in keys:
            try:
                chain = self._ledger.read(self._seq(text), now)
            except KeyUnreadable as why:
                found.append(why)
                continue
            self._counts["gets"] += 1
            segments: Found = []
            for meta, payload in chain:
                if isinstance(payload, bytes):
                    segments.append((meta, payload))
                    continue
                blob = payload.blob
                if (number := numbers.setdefault(id(blob), len(refs))) == len(refs):
                    refs.append(blob.ref)
                segments.append((meta, (number, payload.index)))
            found.append(segments)
        return ReadAnswer(found, refs)

    async def release(self, keys: Sequence[str], tag: str | None) -> int:
        """End keys, or all under a tag; idempotent."""
        ended = sum(self._ledger.release(seq) for seq in self._chosen(keys, tag))
        self._collect()
        return ended

    async def renew(self, keys: Sequence[str], tag: str | None, lease_s: float) -> int:
        """Let leases end ``lease_s`` seconds from now."""
        chosen, now = self._chosen(keys, tag), time.monotonic()
        for seq in chosen:
            self._ledger.renew(seq, now, lease_s)
        return len(chosen)

    async def retag(self, keys: Sequence[str], tag: str) -> int:
        """Move keys under another tag."""
        chosen = self._chosen(keys, None)
        for seq in chosen:
            self._ledger.tag(seq, tag)
        return len(chosen)

    async def stats(self) -> ShardStats:
        """Count what is held and what happened."""
        reserved = sum(nbytes for nbytes, _ in self._grants.values())
        return ShardStats(
            shard=self._identity.shard,
            live_keys=self._ledger.live,
            live_bytes=self._budget.used - reserved,
            byte_budget=self._budget.total,
            waiting_puts=self._budget.waiting,
            puts=self._counts["puts"],
            gets=self._counts["gets"],
            released=self._ledger.released,
            expired=self._ledger.expired,
            full=self._counts["full"],
        )

    async def _reserve(self, nbytes: int) -> None:
        try:
            await self._budget.take(nbytes, self._args.put_timeout_s)
        except StoreError:
            self._counts["full"] += 1
            raise

    def _keep(self, offer: Offer, payload: bytes | Piece) -> str | StoreError:
        try:
            parent = None if offer.parent is None else self._seq(offer.parent)
            seq = self._ledger.add(
                offer.meta,
                payload,
                now=time.monotonic(),
                lease_s=offer.lease_s or self._args.lease_s,
                tag=offer.tag,
                parent=parent,
            )
        except KeyUnreadable as why:
            self._drop(payload)
            return why
        self._counts["puts"] += 1
        who = self._identity
        return Key(who.app, who.shard, who.epoch, seq).sign(self._secret)

    def _seq(self, text: str) -> int:
        key = verify(text, self._identity.app, self._secret)
        if (key.shard, key.epoch) != (self._identity.shard, self._identity.epoch):
            raise RoutesLost("the shard process that held the bytes is gone")
        return key.seq

    def _chosen(self, keys: Sequence[str], tag: str | None) -> list[int]:
        chosen = [] if tag is None else self._ledger.tagged(tag)
        for text in keys:
            try:
                chosen.append(self._seq(text))
            except RoutesLost:
                continue
        return chosen

    def _collect(self) -> None:
        self._to_drop.extend(self._ledger.take_dropped())
        self._drop_some()

    def _drop_some(self) -> None:
        for _ in range(min(_DROP_AT_ONCE, len(self._to_drop))):
            self._drop(self._to_drop.popleft())

    def _drop(self, payload: bytes | Piece) -> None:
        if isinstance(payload, bytes):
            self._budget.give(len(payload))
            return
        payload.blob.needed -= 1
        if not payload.blob.needed:
            self._budget.give(payload.blob.nbytes)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = time.monotonic()
            for swept, _ in enumerate(self._ledger.expire(now)):
                if swept % _DROP_AT_ONCE == 0:
                    await asyncio.sleep(0)
            self._collect()
            while self._to_drop:
                await asyncio.sleep(0)
                self._drop_some()
            for grant in [grant for grant, (_, end) in self._grants.items() if end < now]:
                self._budget.give(self._grants.pop(grant)[0])


def default_budget(shard: str) -> int:
    """Return half of the object store of the node whose id starts with ``shard``, in bytes."""
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeID"].startswith(shard):
            return int(node["Resources"]["object_store_memory"]) // 2
    raise StoreUnavailable(f"no live node's id starts with {shard}")
