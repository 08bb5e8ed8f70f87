"""What a chaos run does to the store: produces, reads, renews, releases, aborts; from threads."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from benchmarks.harness.book import HANG_S, NUM_EXPERTS, Book, Entry, Part
from serve_app.client import RoutedExpertsClient
from serve_app.errors import KeyExpired, KeyUnreadable, R3Error, RoutesLost, StoreError
from serve_app.records import Record, make_record
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.keys import parse
from serve_app.types import RoutedSequence, Where

LEASE_S = 12.0
SHORT_LEASE_S = 2.0
ROWS = (60, 400, 3000, 16000)
LIVE_ENTRIES = 60
_seeds = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Order:
    """One record that a producer is to put."""

    part: Part
    tag: str
    lease_s: float
    parent: str | None = None

    def record(self) -> Record:
        return make_record(self.part.ids(), num_experts=NUM_EXPERTS, start=self.part.start)


class Engine:
    """Stands in for an engine replica: an asyncio actor that a shard pulls from."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._store: ShardStore | None = None

    async def produce(self, orders: Sequence[Order]) -> list[str | BaseException]:
        """Put all records at once; return each one's key or why it has none."""
        puts = [asyncio.create_task(self._put(order)) for order in orders]
        return await asyncio.gather(*puts, return_exceptions=True)

    async def abort(self, orders: Sequence[Order], after_s: float) -> None:
        """Put records and give up on them: nobody learns their keys."""
        puts = [asyncio.create_task(self._put(order)) for order in orders]
        await asyncio.sleep(after_s)
        for put in puts:
            put.cancel()
        await asyncio.gather(*puts, return_exceptions=True)

    async def _put(self, order: Order) -> str:
        if self._store is None:
            me = ray.get_runtime_context().current_actor
            self._store = await asyncio.to_thread(connect, self._app, me)
        return await self._store.aput(
            order.record(), tag=order.tag, lease_s=order.lease_s, parent=order.parent
        )


class Producing(threading.Thread):
    """Drives one engine; starts another when it was killed."""

    def __init__(self, app: str, node: str, book: Book, seed: int, stop: threading.Event) -> None:
        super().__init__(name=f"producing-{node}", daemon=True)
        self._app, self._node, self._book, self._stopping = app, node, book, stop
        self._rng = random.Random(seed)
        self.engine = self._start()

    def run(self) -> None:
        while not self._stopping.is_set():
            if self._rng.random() < 0.2:
                self._abort()
            elif len(self._book.live()) < LIVE_ENTRIES:
                self._produce()
            self._stopping.wait(self._rng.random() * 0.1)

    def _start(self) -> Any:
        actor: Any = ray.remote(Engine)
        return actor.options(num_cpus=0, resources={self._node: 1}).remote(self._app)

    def _orders(self, most: int, lease_s: float) -> list[Order]:
        tag = f"{self._node}-{next(_seeds)}"
        rows = [self._rng.choice(ROWS) for _ in range(self._rng.randint(1, most))]
        return [Order(Part(next(_seeds), count), tag, lease_s) for count in rows]

    def _produce(self) -> None:
        lease_s = self._rng.choice((LEASE_S, LEASE_S, LEASE_S, SHORT_LEASE_S))
        orders = self._orders(6, lease_s)
        parents: dict[int, Entry] = {}
        near = [entry for entry in self._book.live() if entry.tag.startswith(f"{self._node}-")]
        if near and self._rng.random() < 0.5:
            parent = self._rng.choice(near)
            part = Part(next(_seeds), self._rng.choice(ROWS[:3]), start=parent.rows)
            parents[len(orders)] = parent
            orders.append(Order(part, orders[0].tag, lease_s, parent.key))
        begun = time.monotonic()
        kept = self._call(self.engine.produce.remote(orders), begun)
        ended = time.monotonic()
        for number, answer in enumerate(kept or ()):
            above = parents.get(number)
            if isinstance(answer, str):
                self._note(answer, orders[number], above, begun)
            else:
                self._book.check_error(above, answer, begun, ended)

    def _note(self, key: str, order: Order, parent: Entry | None, begun: float) -> None:
        self._book.count("put")
        parts = (*(parent.parts if parent else ()), order.part)
        shard, end = parse(key, self._app).shard, begun + order.lease_s
        self._book.add(Entry(key, parts, shard, order.tag, begun, order.lease_s, end))

    def _abort(self) -> None:
        orders = self._orders(8, SHORT_LEASE_S)
        self._call(self.engine.abort.remote(orders, self._rng.random() * 0.02), time.monotonic())
        self._book.count("aborted", len(orders))

    def _call(self, ref: "ray.ObjectRef[Any]", begun: float) -> list[Any] | None:
        try:
            answer: list[Any] | None = ray.get(ref, timeout=HANG_S)
        except GetTimeoutError:
            self._book.violate(f"{self.name} hangs")
            return None
        except RayActorError:  # what a graph's client would call EngineUnavailable
            self._book.count("EngineUnavailable")
            self.engine = self._start()
            return None
        self._book.took("put", begun, time.monotonic())
        return answer


class Reading(threading.Thread):
    """Reads, renews and releases what the book has, with a client that it shares."""

    def __init__(
        self, client: RoutedExpertsClient, book: Book, seed: int, stop: threading.Event
    ) -> None:
        super().__init__(name=f"reading-{seed}", daemon=True)
        self._client, self._book, self._stopping = client, book, stop
        self._rng = random.Random(seed)

    def run(self) -> None:
        what = (self._get, self._materialize, self._release, self._release_tag, self._renew)
        while not self._stopping.is_set():
            entries = list(self._book.entries.values())[-2 * LIVE_ENTRIES :]
            if not entries:
                self._stopping.wait(0.05)
                continue
            chosen = self._rng.sample(entries, min(len(entries), self._rng.randint(1, 6)))
            (do,) = self._rng.choices(what, (3, 6, 2, 1, 2))
            begun = time.monotonic()
            try:
                do(chosen, begun)
            except Exception as error:  # noqa: BLE001  (an untyped error is what we look for)
                self._book.violate(f"{do.__name__}: {type(error).__name__}: {str(error)[:300]}")
            self._book.took(do.__name__, begun, time.monotonic())

    def _get(self, chosen: list[Entry], begun: float) -> None:
        self.read(chosen[0])

    def read(self, entry: Entry) -> bool:
        """Read one key and judge the answer; False if it may be asked again."""
        begun = time.monotonic()
        try:
            record = self._client.get(entry.key)
        except StoreError as error:
            self._book.check_error(entry, error, begun, time.monotonic())
            return isinstance(error, KeyUnreadable)
        self._book.kept(entry, begun, entry.lease_s)
        self._book.check_ids(entry, record.ids, begun)
        return True

    def _materialize(self, chosen: list[Entry], begun: float) -> None:
        where: Where = self._rng.choice(("local", "decoder", "auto"))
        sequences = [RoutedSequence(entry.key, entry.rows) for entry in chosen]
        try:
            batch = self._client.materialize(sequences, on_missing="mask", where=where)
        except R3Error as error:
            self._judge_batch(chosen, error, begun)
            return
        masked = {gap.index: gap.reason for gap in batch.missing}
        why = {"RoutesLost": RoutesLost, "KeyExpired": KeyExpired}
        for index, entry in enumerate(chosen):
            rows = slice(int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1]))
            if (reason := masked.get(index)) is None:
                self._book.kept(entry, begun, entry.lease_s)
                self._book.check_ids(entry, batch.ids[rows].numpy(), begun)
                continue
            if batch.valid[rows].any() or reason not in why:
                self._book.violate(f"{entry.key} is masked as {reason}")
            else:
                self._book.check_error(entry, why[reason](reason), begun, time.monotonic())

    def _judge_batch(self, chosen: list[Entry], error: R3Error, begun: float) -> None:
        """An error of the batch must be one that one of its keys allows."""
        ended = time.monotonic()
        allowed = [self._book.may_be(entry, error, begun, ended) for entry in chosen]
        if isinstance(error, RoutesLost):  # all were masked
            expired = KeyExpired("masked")
            lost = [self._book.may_be(entry, expired, begun, ended) for entry in chosen]
            if all(one or other for one, other in zip(allowed, lost, strict=True)):
                self._book.count("RoutesLost")
                return
        blamed = chosen[allowed.index(True)] if any(allowed) else chosen[0]
        self._book.check_error(blamed, error, begun, ended)

    def _release(self, chosen: list[Entry], begun: float) -> None:
        self._release_all(chosen, begun, tag=None)

    def _release_tag(self, chosen: list[Entry], begun: float) -> None:
        tag = chosen[0].tag
        same = [entry for entry in list(self._book.entries.values()) if entry.tag == tag]
        self._release_all(same, begun, tag=tag)

    def _release_all(self, entries: list[Entry], begun: float, tag: str | None) -> None:
        for entry in entries:
            entry.release_begun = entry.release_begun or begun
        keys = [] if tag else [entry.key for entry in entries]
        try:
            self._client.release(keys, tag=tag)
        except StoreError as error:
            self._book.check_error(None, error, begun, time.monotonic())
            return
        ended = time.monotonic()
        for entry in entries:
            entry.release_done = entry.release_done or ended
        self._book.count("release")

    def _renew(self, chosen: list[Entry], begun: float) -> None:
        entry = chosen[0]
        try:
            renewed = self._client.renew([entry.key], lease_s=entry.lease_s)
        except StoreError as error:
            self._book.check_error(entry, error, begun, time.monotonic())
            return
        if renewed:
            self._book.kept(entry, begun, entry.lease_s)
            self._book.count("renew")
