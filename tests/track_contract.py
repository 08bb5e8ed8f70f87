"""What every expert store must do with tracks, cut parents and versions; see `store_contract`."""

import numpy as np
import pytest

from serve_app.continuing import put_continued
from serve_app.errors import PrefixMismatch, StoreFull
from serve_app.records import ALL_TRACKS, Record, Track, make_record
from serve_app.store.base import RecordStore
from tests.distinct_ids import distinct_ids
from tests.store_contract import LARGE, SMALL, MakeStore, read

Shape = tuple[int, int, int]
HUGE = (20_000, 4, 2)  # its tokens alone are too many to travel in a call
RAGGED = Track(np.arange(40, dtype=np.int32), np.array([0, *[2] * 18, 30, 40], np.int64))


def tracked(shape: Shape, *, start: int = 0, seed: int = 0, version: int = 0) -> Record:
    rows = shape[0]
    return make_record(
        distinct_ids(shape, 128, seed),
        num_experts=128,
        start=start,
        weight_version=version,
        tokens=np.arange(start, start + rows) + 1000 * seed,
        tracks={
            "score": np.linspace(0, 1, rows, dtype=np.float32),
            "indexer": np.arange(rows * shape[1] * 3, dtype=np.uint16).reshape(rows, shape[1], 3),
        },
    )


class TrackContract:
    @pytest.fixture
    def store(self, make_store: MakeStore) -> RecordStore:
        return make_store()

    @pytest.mark.parametrize("shape", [SMALL, LARGE, HUGE])
    async def test_only_the_tracks_that_are_asked_for_come(
        self, store: RecordStore, shape: Shape
    ) -> None:
        put = tracked(shape)
        for key in (store.put(put), await store.aput(put)):
            (alone,) = read(store, key)
            assert dict(alone.tracks) == {}
            assert alone.tokens is None
            np.testing.assert_array_equal(alone.ids, put.ids)
            (found,) = store.fetch([key], tracks=["tokens", "indexer", "nothing"])
            assert isinstance(found, list)
            assert set(found[0].tracks) == {"tokens", "indexer"}
            for name, track in found[0].tracks.items():
                np.testing.assert_array_equal(track.values, put.tracks[name].values)
                assert track.values.dtype == put.tracks[name].values.dtype
            (whole,) = store.fetch([key], tracks=ALL_TRACKS)
            assert isinstance(whole, list)
            assert set(whole[0].tracks) == {"tokens", "score", "indexer"}
            whole[0].meta.verify(whole[0].ids, dict(whole[0].tracks))
            parts = store.fetch_track(key, "score")
            assert isinstance(parts, list)
            ((meta, score),) = parts
            assert meta.rows == shape[0]
            assert score is not None
            np.testing.assert_array_equal(score.values, put.tracks["score"].values)
            assert store.fetch_track(key, "nothing") == [(meta, None)]
            (chain,) = store.describe([key])
            assert chain == [put.meta]

    def test_ragged_tracks_come_back(self, store: RecordStore) -> None:
        put = make_record(distinct_ids(SMALL, 128), num_experts=128, tracks={"support": RAGGED})
        (found,) = store.fetch([store.put(put)], tracks=["support"])
        assert isinstance(found, list)
        support = found[0].tracks["support"]
        assert support.offsets is not None
        np.testing.assert_array_equal(support.values, RAGGED.values)
        np.testing.assert_array_equal(support.offsets, RAGGED.offsets)
        np.testing.assert_array_equal(support.part(18, 20).values, np.arange(2, 40))

    @pytest.mark.parametrize("shape", [SMALL, LARGE, HUGE])
    def test_tracks_count_in_the_budget_and_go_with_their_record(
        self, make_store: MakeStore, shape: Shape
    ) -> None:
        put = tracked(shape)
        size = shape[0] * (shape[1] * shape[2] + 4 + 4 + shape[1] * 3 * 2)
        assert put.meta.nbytes == size
        store = make_store(byte_budget=size, put_timeout_s=0.1)
        key = store.put(put)
        assert store.stats().live_bytes == size
        with pytest.raises(StoreFull):
            store.put(tracked((1, 1, 1)))
        store.release([key])
        key = store.put(put)
        assert store.stats().live_bytes == size
        store.release([key])

    @pytest.mark.parametrize("shape", [SMALL, LARGE])
    @pytest.mark.parametrize("cut", [1, 7, 20])
    def test_a_child_may_begin_in_the_middle_of_its_parent(
        self, store: RecordStore, shape: Shape, cut: int
    ) -> None:
        parent, child = tracked(shape), tracked(shape, start=cut, seed=1, version=3)
        first = store.put(parent)
        key = store.put(child, parent=first, parent_rows=cut)
        (whole,) = read(store, first)
        np.testing.assert_array_equal(whole.ids, parent.ids)
        store.release([first])  # the child needs it still
        (found,) = store.fetch([key], tracks=["tokens"])
        assert isinstance(found, list)
        assert [(part.start, part.meta.stop, part.weight_version) for part in found] == [
            (0, cut, 0),
            (cut, cut + shape[0], 3),
        ]
        np.testing.assert_array_equal(found[0].ids, parent.ids[:cut])
        assert found[0].tokens is not None
        np.testing.assert_array_equal(found[0].tokens, np.arange(cut))
        np.testing.assert_array_equal(found[1].ids, child.ids)
        (chain,) = store.describe([key])
        assert isinstance(chain, list)
        assert [meta.stop for meta in chain] == [cut, cut + shape[0]]

    def test_divergent_turns_are_not_stitched(self, store: RecordStore) -> None:
        first = store.put(tracked(SMALL))
        other = make_record(
            distinct_ids((24, 4, 2), 128, 5),
            num_experts=128,
            tokens=[*range(9), 77, *range(10, 24)],
        )
        with pytest.raises(PrefixMismatch, match=r"position 9: expected token 9, .* got 77"):
            put_continued(store, other, first)
        put = put_continued(store, other, first, "prefix")
        assert put.rows == 9
        (found,) = store.fetch([put.key])
        assert isinstance(found, list)
        np.testing.assert_array_equal(
            np.concatenate([part.ids for part in found]),
            np.concatenate([tracked(SMALL).ids[:9], other.ids[9:]]),
        )
        assert store.stats().live_keys == 2

    def test_keys_of_earlier_weights_end_together(self, store: RecordStore) -> None:
        keys = [store.put(tracked((2, 1, 1), version=version)) for version in (1, 2, 2, 3)]
        child = store.put(tracked((1, 1, 1), start=2, version=3), parent=keys[0])
        assert store.release(weight_version_below=3) == 3
        assert store.stats().live_keys == 2
        assert len(read(store, child)) == 2  # a key's weights are its newest part's
        assert store.release(weight_version_below=3) == 0
        assert store.release(weight_version_below=4) == 2

    def test_rows_that_nobody_routed_are_counted(self, store: RecordStore) -> None:
        ids = distinct_ids(SMALL, 128)
        ids[3:5] = 0
        before = sum(shard.unrouted_rows for shard in store.stats().shards)
        key = store.put(make_record(ids, num_experts=128))
        after = sum(shard.unrouted_rows for shard in store.stats().shards)
        assert after - before == 2
        (found,) = read(store, key)
        assert found.meta.invalid == (3, 4)
        assert found.valid.sum() == SMALL[0] - 2
