"""What of a rollout's record is stored, and under which parent."""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

from serve_app.assemble.joining import joined
from serve_app.config import StoreArgs
from serve_app.deployments.sampling.routes import Earlier, RouteKeys
from serve_app.engines.base import ModelInfo
from serve_app.errors import KeyReleased
from serve_app.records import ALL_TRACKS, Record, hash_tokens, make_record, new_part_of, part_of
from serve_app.store.base import RecordStore
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import GenerateRequest
from tests.distinct_ids import distinct_ids
from tests.eventually import eventually

TOKENS = list(range(100, 115))


class FarStore(MemoryStore):
    """A store whose every record lies on another node."""

    def is_local(self, key: str) -> bool:
        return False


def record(rows: int, version: int = 0) -> Record:
    ids = distinct_ids((rows, 2, 2), 8, seed=version)
    return make_record(ids, num_experts=8, tokens=TOKENS[:rows], weight_version=version)


def keys_of(store: RecordStore) -> RouteKeys:
    async def connect() -> RecordStore:
        return store

    return RouteKeys(connect)


def request() -> GenerateRequest:
    return GenerateRequest(input_ids=[1], return_routed_experts=True, tag="mine")


@pytest.mark.parametrize("kind", [MemoryStore, FarStore])
async def test_parts_keep_their_versions_near_and_far(kind: type[MemoryStore]) -> None:
    store = kind("app", StoreArgs(backend="memory"))
    keys = keys_of(store)
    first = await keys.put(request(), record(9), None)
    second = await keys.put(request(), record(12, version=1), Earlier(first, 9))
    third = await keys.put(request(), record(15, version=2), Earlier(second, 12))
    assert store.stats().live_keys == 3
    (chain,) = store.describe([third])
    assert isinstance(chain, list)
    assert [(part.start, part.stop, part.weight_version) for part in chain] == [
        (0, 9, 0),
        (9, 12, 1),
        (12, 15, 2),
    ]
    assert [part.token_hash for part in chain] == [
        hash_tokens(TOKENS[part.start : part.stop]) for part in chain
    ]
    (before,) = store.fetch([first])
    assert isinstance(before, list)
    np.testing.assert_array_equal(before[0].ids, record(9).ids)
    store.release([first, second])
    (parts,) = store.fetch([third])
    assert isinstance(parts, list)
    np.testing.assert_array_equal(parts[0].ids, record(9).ids)
    assert store.release(tag="mine") == 1
    assert (store.stats().live_keys, store.stats().live_bytes) == (0, 0)


@pytest.mark.parametrize("kind", [MemoryStore, FarStore])
@pytest.mark.parametrize("common", [7, 9, 10])
async def test_an_edited_history_takes_over_what_is_common_near_and_far(
    kind: type[MemoryStore], common: int
) -> None:
    store = kind("app", StoreArgs(backend="memory"))
    keys = keys_of(store)
    first = await keys.put(request(), record(9), None)
    second = await keys.put(request(), record(12, version=1), Earlier(first, 9))
    edited = [*TOKENS[:common], *range(200, 213 - common)]  # 13 tokens
    info = ModelInfo("any", 2, (0, 1), 8, 2, 500, 100)
    earlier = await keys.earlier(second, edited, info, "prefix")
    assert earlier == Earlier(second, common, is_cut=True)
    ids = distinct_ids((13, 2, 2), 8, seed=9)
    new = make_record(ids, num_experts=8, tokens=edited, weight_version=2)
    key = await keys.put(request(), new, earlier)
    (chain,) = store.fetch([key], None, ALL_TRACKS)
    assert isinstance(chain, list)
    whole = joined(chain)
    before = [*record(9).ids, *record(12, version=1).ids[9:]]
    np.testing.assert_array_equal(whole.ids, [*before[:common], *ids[common:]])
    assert whole.tokens is not None
    assert whole.tokens.tolist() == edited
    (parent,) = store.fetch([second])
    assert isinstance(parent, list)
    np.testing.assert_array_equal(joined(parent).ids, before)


async def test_a_parent_released_meanwhile_is_said() -> None:
    store = MemoryStore("app", StoreArgs(backend="memory"))
    keys = keys_of(store)
    first = await keys.put(request(), record(9), None)
    store.release([first])
    with pytest.raises(KeyReleased):
        await keys.put(request(), record(12), Earlier(first, 9))
    assert store.stats().live_bytes == 0


async def test_shared_rows_live_as_long_as_a_member() -> None:
    store = MemoryStore("app", StoreArgs(backend="memory"))
    keys = keys_of(store)
    whole = record(12)
    async with keys.shared_rows(request(), part_of(whole, 0, 9), None) as shared:
        members = [await keys.put(request(), whole, shared) for _ in range(3)]
    assert (store.stats().live_keys, store.stats().live_bytes) == (3, (9 + 3 * 3) * 8)
    store.release(members[:2])
    assert store.stats().live_bytes == (9 + 3) * 8
    store.release(members[2:])
    assert store.stats().live_bytes == 0


@pytest.mark.parametrize(("first", "start"), [(0, 0), (5, 5), (11, 11), (12, 11), (99, 11)])
def test_a_cut_record_is_never_empty(first: int, start: int) -> None:
    part = new_part_of(record(12), first)
    assert (part.start, part.meta.stop) == (start, 12)
    assert part.meta.token_hash == hash_tokens(TOKENS[start:12])
    np.testing.assert_array_equal(part.ids, record(12).ids[start:])


def test_rows_that_mean_nothing_stay_marked() -> None:
    valid = np.array([True, False, True, False])
    marked = make_record(np.zeros((4, 1, 1), np.uint8), num_experts=2, valid=valid)
    assert new_part_of(marked, 1).valid.tolist() == [False, True, False]
    assert part_of(marked, 0, 3).valid.tolist() == [True, False, True]


CALL: ContextVar[str | None] = ContextVar("call", default=None)


class WatchingStore(MemoryStore):
    """Notes in whose call its methods are called; a put waits until it is let through."""

    def __init__(self) -> None:
        super().__init__("app", StoreArgs(backend="memory"))
        self.calls: list[tuple[str, str | None]] = []
        self.begun, self.open = asyncio.Event(), asyncio.Event()

    async def aput(self, record: Record, **how: Any) -> str:
        self.calls.append(("put", CALL.get()))
        self.begun.set()
        await self.open.wait()
        return await super().aput(record, **how)

    def release(self, keys: Sequence[str] = (), **which: Any) -> int:
        self.calls.append(("release", CALL.get()))
        return super().release(keys, **which)


async def test_what_is_put_and_released_is_of_no_call_that_may_be_cancelled() -> None:
    """Ray cancels what a cancelled call has called, and knows by its context which that is."""
    store = WatchingStore()
    keys = keys_of(store)
    CALL.set("a rollout's")
    putting = asyncio.create_task(keys.put(request(), record(9), None))
    await store.begun.wait()
    putting.cancel()
    store.open.set()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await asyncio.to_thread(eventually, lambda: ("release", None) in store.calls)
    assert store.stats().live_keys == 0
    key = await keys.put(request(), record(9), None)
    releasing = asyncio.create_task(keys.release([key]))
    await asyncio.sleep(0)  # it has begun
    releasing.cancel()
    assert await asyncio.to_thread(eventually, lambda: store.stats().live_keys == 0)
    assert {call for _, call in store.calls} == {None}
