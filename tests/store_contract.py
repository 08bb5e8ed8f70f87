"""What every expert store must do, written against `RecordStore` alone.

A test module subclasses `StoreContract` and provides the fixture ``make_store``.
"""

import asyncio
import threading
import time
from typing import Any, Protocol

import numpy as np
import pytest

from serve_app.errors import (
    KeyExpired,
    KeyReleased,
    StoreFull,
    UnknownKey,
)
from serve_app.records import Record, make_record
from serve_app.store.base import RecordStore
from tests.distinct_ids import distinct_ids

LARGE = (600, 48, 8)  # over the size up to which a record's bytes stay in the shard
SMALL = (20, 4, 2)
SMALL_LIKE = (8, 48, 8)


class MakeStore(Protocol):
    def __call__(self, **args: Any) -> RecordStore: ...


def record(shape: tuple[int, int, int] = SMALL, *, start: int = 0, seed: int = 0) -> Record:
    return make_record(distinct_ids(shape, 128, seed), num_experts=128, start=start)


def read(store: RecordStore, key: str) -> list[Record]:
    (found,) = store.fetch([key])
    if not isinstance(found, list):
        raise found
    return found


def expire(store: RecordStore, keys: int) -> None:
    """Wait until so many leases ended; asking is how a store without a clock sweeps."""
    deadline = time.monotonic() + 30
    tick = threading.Event()
    while store.stats().live_keys > keys:
        assert time.monotonic() < deadline, "leases did not end"
        tick.wait(0.05)


class StoreContract:
    @pytest.fixture
    def store(self, make_store: MakeStore) -> RecordStore:
        return make_store()

    @pytest.mark.parametrize("shape", [SMALL, LARGE])
    def test_reads_what_was_put_any_number_of_times(
        self, store: RecordStore, shape: tuple[int, int, int]
    ) -> None:
        put = record(shape)
        key = store.put(put)
        for _ in range(3):
            (got,) = read(store, key)
            assert got.meta == put.meta
            assert not got.ids.flags.writeable
            np.testing.assert_array_equal(got.ids, put.ids)

    async def test_concurrent_puts_all_get_their_own_bytes(self, store: RecordStore) -> None:
        puts = [record(SMALL if i % 3 else LARGE, seed=i) for i in range(12)]
        keys = await asyncio.gather(*(store.aput(put) for put in puts))
        found = await asyncio.to_thread(store.fetch, keys)
        for put, segments in zip(puts, found, strict=True):
            assert isinstance(segments, list)
            np.testing.assert_array_equal(segments[0].ids, put.ids)

    def test_release_is_idempotent_and_final(self, store: RecordStore) -> None:
        keys = [store.put(record(shape)) for shape in (SMALL, LARGE)]
        assert store.release(keys) == 2
        assert store.release(keys) == 0
        for key in keys:
            with pytest.raises(KeyReleased):
                read(store, key)
        assert store.stats().live_bytes == 0

    def test_release_by_tag_spares_the_others(self, store: RecordStore) -> None:
        tagged = [store.put(record(), tag="step-1") for _ in range(3)]
        other = store.put(record(), tag="step-2")
        assert store.retag([tagged[0]], "step-2") == 1
        assert store.release(tag="step-1") == 2
        assert store.release(tag="no such tag") == 0
        assert len(read(store, tagged[0])) == len(read(store, other)) == 1
        assert store.release(tag="step-2") == 2

    def test_a_lease_ends(self, store: RecordStore) -> None:
        short, long = store.put(record(LARGE), lease_s=0.2), store.put(record())
        expire(store, keys=1)
        with pytest.raises(KeyExpired):
            read(store, short)
        assert store.release([short]) == 0
        read(store, long)
        assert store.stats().shards[0].expired == 1
        assert store.stats().live_bytes == record().meta.nbytes

    def test_renewing_keeps_a_key(self, store: RecordStore) -> None:
        kept, lost = store.put(record(), lease_s=0.3), store.put(record(), lease_s=0.3)
        by_tag = store.put(record(), lease_s=0.3, tag="keep")
        assert store.renew([kept], lease_s=60) == 1
        assert store.renew(tag="keep", lease_s=60) == 1
        expire(store, keys=2)
        read(store, kept)
        read(store, by_tag)
        with pytest.raises(KeyExpired):
            read(store, lost)

    def test_made_up_mangled_and_foreign_keys_are_unknown(
        self, store: RecordStore, make_store: MakeStore
    ) -> None:
        key = store.put(record())
        flipped = key[:-1] + ("A" if key[-1] != "A" else "B")
        foreign = make_store(app="another").put(record())
        for bad in ("", "not a key", key[:-4], flipped, flipped + "A"):
            with pytest.raises(UnknownKey):
                read(store, bad)
        with pytest.raises(UnknownKey, match="another"):
            read(store, foreign)
        with pytest.raises(UnknownKey):
            store.release([foreign])

    def test_one_bad_key_does_not_hide_the_others(self, store: RecordStore) -> None:
        good, gone = store.put(record()), store.put(record())
        store.release([gone])
        found = store.fetch([gone, good, "bad", good])
        assert [type(answer) for answer in found] == [KeyReleased, list, UnknownKey, list]

    def test_a_child_reads_as_its_whole_sequence(self, store: RecordStore) -> None:
        parent = store.put(record(LARGE, seed=1))
        child = store.put(record(SMALL_LIKE, start=LARGE[0], seed=2), parent=parent)
        assert [part.start for part in read(store, child)] == [0, LARGE[0]]
        store.release([parent])
        with pytest.raises(KeyReleased):
            read(store, parent)
        assert [part.meta.rows for part in read(store, child)] == [LARGE[0], SMALL_LIKE[0]]
        store.release([child])
        assert store.stats().live_bytes == 0

    def test_an_unreadable_parent_refuses_the_child(self, store: RecordStore) -> None:
        parent = store.put(record())
        store.release([parent])
        with pytest.raises(KeyReleased):
            store.put(record(start=SMALL[0]), parent=parent)
        assert store.stats().live_keys == 0
        assert store.stats().live_bytes == 0

    def test_a_full_store_waits_then_refuses_and_keeps_what_lives(
        self, make_store: MakeStore
    ) -> None:
        need = record(LARGE).meta.nbytes
        store = make_store(app="full", byte_budget=2 * need, put_timeout_s=0.5)
        first, second = store.put(record(LARGE, seed=1)), store.put(record(LARGE, seed=2))
        with pytest.raises(StoreFull, match=str(need)):
            store.put(record(LARGE))
        with pytest.raises(StoreFull, match="never"):
            store.put(record((1500, 48, 8)))
        read(store, first)
        store.release([second])
        store.put(record(LARGE))
        assert store.stats().shards[0].full == 2

    def test_a_release_serves_a_waiting_put(self, make_store: MakeStore) -> None:
        need = record(LARGE).meta.nbytes
        store = make_store(app="waits", byte_budget=need, put_timeout_s=30)
        first = store.put(record(LARGE))
        keys: list[str] = []
        waiter = threading.Thread(target=lambda: keys.append(store.put(record(LARGE, seed=3))))
        waiter.start()
        deadline = time.monotonic() + 20
        while store.stats().shards[0].waiting_puts == 0:
            assert time.monotonic() < deadline, "the put did not wait"
        store.release([first])
        waiter.join(20)
        np.testing.assert_array_equal(read(store, keys[0])[0].ids, record(LARGE, seed=3).ids)
