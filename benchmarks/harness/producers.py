"""Asyncio actors that put records as engines do, our way and upstream's."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import ray

from benchmarks.harness.routes import random_routes
from serve_app.records import Record, make_record
from serve_app.store.access.client import ShardStore, connect

TICK_S = 0.001  # a loop of libuv counts whole milliseconds


class Producer:
    """Holds ``count`` records of one shape and sends them to either store, any number of times."""

    def __init__(self, shape: tuple[int, int, int], count: int, upstream: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._records = [
            make_record(random_routes(shape, 128, rng), num_experts=128) for _ in range(count)
        ]
        self._upstream = upstream
        self._store: ShardStore
        self._keys: list[str] = []

    async def connect(self, app: str) -> None:
        me = ray.get_runtime_context().current_actor
        self._store = await asyncio.to_thread(connect, app, me)

    async def put(self) -> list[str]:
        """Put all records at once; the shard pulls them out of this process."""
        return await asyncio.gather(*map(self._store.aput, self._records))

    async def put_upstream(self) -> list[str]:
        """Put all records at once, as arguments of upstream's actor."""
        put = self._upstream.put.remote
        keys: list[str] = await asyncio.gather(*(put(record.ids) for record in self._records))
        return keys

    async def round_trip(self, release: bool) -> tuple[float, float]:
        """Put all records and read them back; release them, too, or leave that to `give_up`.

        Returns when that began and when it ended.
        """
        begun = time.perf_counter()
        self._keys = await self.put()
        found = await asyncio.to_thread(self._store.fetch, self._keys)
        for record, segments in zip(self._records, found, strict=True):
            assert isinstance(segments, list)
            _check(record, segments[0].ids)
        if release:
            await self.give_up()
        return begun, time.perf_counter()

    async def give_up(self) -> None:
        """Release what the last round trip put."""
        await asyncio.to_thread(self._store.release, self._keys)

    async def round_trip_upstream(self) -> tuple[float, float]:
        """Put all records and read them back; return when that began and when it ended."""
        begun = time.perf_counter()
        get = self._upstream.get.remote
        found = await asyncio.gather(*(get(key) for key in await self.put_upstream()))
        for record, ids in zip(self._records, found, strict=True):
            _check(record, ids)
        return begun, time.perf_counter()

    async def fill(self, total: int, keep: int) -> list[str]:
        """Put so many copies of the first record; return some of their keys, at random.

        Each has a header of its own: those that share one would travel cheaper together.
        """
        kept: list[str] = []
        first = self._records[0]
        for at in range(0, total, 4096):
            count = min(4096, total - at)
            copies = [Record(first.meta._replace(), first.ids) for _ in range(count)]
            keys = await asyncio.gather(*map(self._store.aput, copies))
            kept += random.sample(keys, min(count, max(1, keep * count // total)))
        return kept

    async def blocked(self, kind: str, puts: int) -> list[float]:
        """Return, for each of so many single puts, the longest time the loop stood still, in ms."""
        ways = {"ours": self._one, "blocking": self._one_blocking, "idle": _nothing}
        put: Callable[[Record], Awaitable[None]] = ways[kind]
        worst = []
        for number in range(puts):
            gaps: list[float] = []
            ticked = asyncio.Event()
            watch = asyncio.create_task(_watch(gaps, ticked))
            await asyncio.sleep(2 * TICK_S)
            gaps.clear()
            await put(self._records[number % len(self._records)])
            for _ in range(2):  # what the put left to do belongs to it
                ticked.clear()
                await ticked.wait()
            watch.cancel()
            worst.append(max(gaps) * 1e3)
        return worst

    async def _one(self, record: Record) -> None:
        await self._store.aput(record, lease_s=2)

    async def _one_blocking(self, record: Record) -> None:
        key = ray.get(self._upstream.put.remote(record.ids))  # as LMDeploy does
        del key


async def _watch(gaps: list[float], ticked: asyncio.Event) -> None:
    while True:
        begun = time.perf_counter()
        await asyncio.sleep(TICK_S)
        gaps.append(time.perf_counter() - begun - TICK_S)
        ticked.set()


async def _nothing(record: Record) -> None:
    await asyncio.sleep(record.meta.nbytes / 2e9)


def _check(record: Record, ids: Any) -> None:
    assert ids.shape == record.ids.shape
    assert (ids[-1] == record.ids[-1]).all()
