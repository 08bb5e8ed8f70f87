"""Children of unusual parents: with gaps, cut themselves, not from row 0, with rows of nobody."""

from typing import Any

import numpy as np
import pytest

from serve_app.assemble.joining import joined
from serve_app.config import StoreArgs
from serve_app.continuing import put_continued, same_by_hash
from serve_app.deployments.sampling.routes import RouteKeys
from serve_app.engines.base import ModelInfo
from serve_app.errors import PrefixMismatch, RecordError
from serve_app.materialize import materialize
from serve_app.records import UNKNOWN, Record, Track, make_record
from serve_app.store.base import RecordStore, Segments
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, RoutedSequence
from tests.distinct_ids import distinct_ids

INFO = ModelInfo("tiny", 3, (0, 1, 2), 16, 2, 1000, 1000)


class Elsewhere(MemoryStore):
    """A store whose records all lie on another node."""

    def is_local(self, key: str) -> bool:
        return False


@pytest.fixture(params=[MemoryStore, Elsewhere])
def store(request: pytest.FixtureRequest) -> MemoryStore:
    made: MemoryStore = request.param("edges", StoreArgs(backend="memory"))
    return made


def part(start: int, rows: int, seed: int = 0, **how: Any) -> Record:
    tokens = how.pop("tokens", np.arange(start, start + rows))
    ids = distinct_ids((rows, 3, 2), 16, seed)
    return make_record(ids, num_experts=16, start=start, tokens=tokens, **how)


def read(store: RecordStore, key: str) -> Segments:
    (chain,) = store.fetch([key], tracks=["tokens", "score", "support"])
    assert isinstance(chain, list)
    return chain


def with_a_gap(store: RecordStore) -> str:
    first = store.put(part(0, 10, seed=1))
    return put_continued(store, part(15, 5, seed=2), first).key


def test_what_lies_behind_a_parents_gap_is_cut_off_where_tokens_part(store: MemoryStore) -> None:
    tokens = [*range(17), 99, *range(18, 25)]
    child = part(0, 25, seed=3, tokens=tokens)
    put = put_continued(store, child, with_a_gap(store), "prefix")
    assert put.rows == 10
    batch = materialize(store, [RoutedSequence(put.key, 25)], BatchSpec(tracks=("tokens",)))
    np.testing.assert_array_equal(batch.ids[10:], child.ids[10:])
    assert batch.tokens is not None
    assert batch.tokens.tolist() == tokens


async def test_rows_that_were_never_compared_are_not_taken_over(store: MemoryStore) -> None:
    async def connect() -> RecordStore:
        return store

    keys, parent = RouteKeys(connect), with_a_gap(store)
    with pytest.raises(PrefixMismatch, match="expected at least 20 tokens, got 12"):
        await keys.earlier(parent, list(range(12)), INFO)
    earlier = await keys.earlier(parent, list(range(12)), INFO, "prefix")
    assert earlier is not None
    assert (earlier.rows, earlier.cut) == (10, 10)
    with pytest.raises(PrefixMismatch, match="position 3: expected token 3"):
        await keys.earlier(parent, [0, 1, 2, 2**40], INFO)


def test_a_parent_that_does_not_begin_at_row_0_stays(store: MemoryStore) -> None:
    first = store.put(part(5, 5))
    put = put_continued(store, part(10, 5), first)
    assert [(one.start, one.meta.stop) for one in read(store, put.key)] == [(5, 10), (10, 15)]


def test_copies_of_a_cut_chain_are_sealed_anew() -> None:
    store = Elsewhere("edges", StoreArgs(backend="memory"))
    support = Track(np.arange(20), np.arange(0, 22, 2))
    first = store.put(part(0, 10, tracks={"support": support}))
    cut = store.put(part(5, 5, seed=1), parent=first, parent_rows=5)
    put = put_continued(store, part(10, 2, seed=2), cut)
    store.release([first, cut])
    chain = read(store, put.key)
    assert [(one.start, one.meta.stop) for one in chain] == [(0, 5), (5, 10), (10, 12)]
    for one in chain:
        one.meta.verify(one.ids, dict(one.tracks))
    assert chain[0].tracks["support"].values.tolist() == list(range(10))
    store.release([put.key])
    assert store.stats().live_bytes == 0


def test_a_segment_that_no_row_comes_from_says_nothing_of_tracks(store: MemoryStore) -> None:
    first = store.put(part(0, 10, tokens=None))
    put = put_continued(store, part(0, 10), first)
    assert joined(read(store, put.key)).ids.shape == (10, 3, 2)


@pytest.mark.parametrize(
    "score", [np.zeros(2, np.int32), np.zeros((2, 2)), Track(np.zeros(4), np.array([0, 2, 4]))]
)
def test_tracks_of_one_name_are_of_one_kind(store: MemoryStore, score: Any) -> None:
    first = store.put(part(0, 5, tracks={"score": np.zeros(5)}))
    with pytest.raises(RecordError, match=r"track 'score' as \(dtype, shape, ragged\).* got"):
        put_continued(store, part(5, 2, tracks={"score": score}), first)
    same = put_continued(store, part(5, 2, tracks={"score": np.ones(2)}), first)
    assert joined(read(store, same.key)).tracks["score"].values.tolist() == [0] * 5 + [1] * 2


@pytest.mark.parametrize("mode", ["raise", "prefix"])
def test_rows_at_a_parents_end_that_nobody_routed_may_be_captured_later(
    store: MemoryStore, mode: Any
) -> None:
    ids = distinct_ids((6, 3, 2), 16)
    ids[4:] = 0
    first = store.put(make_record(ids, num_experts=16, tokens=range(6)))
    child = part(4, 4, seed=1)
    put = put_continued(store, child, first, mode)
    assert put.rows == 4
    batch = materialize(store, [RoutedSequence(put.key, 8)])
    assert batch.valid.all()
    np.testing.assert_array_equal(batch.ids[4:], child.ids)
    later = put_continued(store, part(6, 2), first, mode)  # has no better ones
    batch = materialize(store, [RoutedSequence(later.key, 8)], BatchSpec(pad="spread"))
    assert batch.valid.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert all(len(set(row)) == 2 for row in batch.ids[4:6].reshape(-1, 2).tolist())


def test_a_record_may_be_put_as_it_was_read(store: MemoryStore) -> None:
    key = store.put(part(0, 5, tracks={"score": np.zeros(5)}))
    (chain,) = store.fetch([key], tracks=["score"])
    assert isinstance(chain, list)
    again = store.put(chain[0])
    assert set(read(store, again)[0].tracks) == {"score"}
    store.release([key, again])
    assert store.stats().live_bytes == 0


def test_unknown_tokens_prove_nothing() -> None:
    tokens = [1, -1, 3]
    assert not same_by_hash([part(0, 3, tokens=tokens).meta], tokens)
    assert same_by_hash([part(0, 3).meta], [0, 1, 2, 3])
    with pytest.raises(RecordError, match="a token a row, got a ragged track"):
        make_record(
            distinct_ids((3, 1, 2), 8),
            num_experts=8,
            tracks={"tokens": Track(np.array([5, 6, 7]), np.array([0, 0, 1, 3]))},
        )


def test_tokens_that_nobody_knows_hide_none_that_both_know(store: MemoryStore) -> None:
    known = [1, UNKNOWN, 3, 4, UNKNOWN, 6]
    parent = store.put(part(0, 6, tokens=known))
    same = [1, 2, UNKNOWN, 4, 5, 6, 7]
    assert len(read(store, put_continued(store, part(0, 7, seed=1, tokens=same), parent).key)) == 2
    for at in (2, 3, 5):  # behind a row that one of them does not know
        other = [1, 2, 3, 4, 5, 6, 7]
        other[at] = 99
        child = part(0, 7, seed=1, tokens=other)
        where = f"position {at}: expected token {known[at]},.* got 99"
        with pytest.raises(PrefixMismatch, match=where):
            put_continued(store, child, parent)
        # What nobody knows to be common is not taken over.
        assert put_continued(store, child, parent, "prefix").rows == 1


def test_a_child_that_ends_before_its_parent_reads_as_all_of_it(store: MemoryStore) -> None:
    parent = store.put(part(0, 6, seed=1))
    shorter = put_continued(store, part(0, 3, seed=2, weight_version=1), parent).key
    longer = put_continued(store, part(0, 8, seed=3, weight_version=2), shorter).key
    store.release([parent, shorter])
    batch = materialize(store, [RoutedSequence(longer, 9)], BatchSpec())
    np.testing.assert_array_equal(batch.ids[:6], part(0, 6, seed=1).ids)
    np.testing.assert_array_equal(batch.ids[6:8], part(0, 8, seed=3).ids[6:])
    assert [batch.versions[number] for number in batch.version_of[:8]] == [0] * 6 + [2] * 2
