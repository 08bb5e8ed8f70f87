"""Tracks on real shards: by value, in objects of their own, through snapshots."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from serve_app import RoutedExpertsClient, RoutedSequence
from serve_app.continuing import put_continued
from serve_app.store.access import archive
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.owner.directory import find_shard, remove_actors, this_node
from tests.cluster.nodes.actors import start
from tests.store_contract import LARGE, MakeStore
from tests.track_contract import HUGE, TrackContract, tracked


class TestShardTracks(TrackContract):
    """Everything a `RecordStore` promises of tracks, cut parents and versions."""


@ray.remote(num_cpus=0)
class TrackingEngine:
    """Puts records with tracks from its event loop, many at once, so that they are pulled."""

    async def put(self, app: str, count: int) -> list[str]:
        store = await asyncio.to_thread(connect, app, ray.get_runtime_context().current_actor)
        records = [tracked(HUGE if n % 2 else LARGE, seed=n) for n in range(count)]
        return list(await asyncio.gather(*(store.aput(record) for record in records)))


def test_pulled_tracks_are_objects_of_their_own(make_store: MakeStore) -> None:
    store = make_store(app="tracks")
    keys = ray.get(start(TrackingEngine, "trainer").put.remote("tracks", 6))
    shard = find_shard("tracks", this_node())
    assert shard is not None
    routes: Any = ray.get(shard.read.remote(keys, ("routes",)))
    tokens: Any = ray.get(shard.read.remote(keys, ("tokens",)))
    assert routes.refs
    assert not set(routes.refs) & set(tokens.refs)
    fetched = [array for ref in routes.refs for array in ray.get(ref)]
    assert sorted(array.nbytes for array in fetched) == sorted(
        tracked(HUGE if n % 2 else LARGE).ids.nbytes for n in range(6)
    )
    found = store.fetch(keys, tracks=["tokens", "score", "indexer"])
    for number, chain in enumerate(found):
        assert isinstance(chain, list)
        put = tracked(HUGE if number % 2 else LARGE, seed=number)
        np.testing.assert_array_equal(chain[0].ids, put.ids)
        for name, track in put.tracks.items():
            np.testing.assert_array_equal(chain[0].tracks[name].values, track.values)
    store.release(keys)


def test_tokens_and_cut_parents_come_through_a_snapshot(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(app="kept")
    assert isinstance(store, ShardStore)
    first = store.put(tracked(LARGE))
    branch = put_continued(store, tracked((90, *LARGE[1:]), start=40, seed=1), first, "prefix")
    assert branch.rows == 40
    report = archive.save(store, tmp_path / "saved")
    assert report.refused == ()
    remove_actors("kept", 30)
    again = make_store(app="kept")
    assert isinstance(again, ShardStore)
    assert archive.restore(again, tmp_path / "saved").refused == ()
    (chain,) = again.fetch([branch.key], tracks=["tokens", "indexer"])
    assert isinstance(chain, list)
    assert [(part.start, part.meta.stop) for part in chain] == [(0, 40), (40, 130)]
    assert chain[1].tokens is not None
    assert chain[1].tokens.tolist() == list(range(1040, 1130))
    np.testing.assert_array_equal(chain[0].ids, tracked(LARGE).ids[:40])


@pytest.mark.parametrize("where", ["local", "decoder"])
def test_a_batch_brings_tokens_and_versions_along(client: RoutedExpertsClient, where: str) -> None:
    ids = tracked(LARGE).ids
    first = client.put(
        ids, num_experts=128, tokens=range(LARGE[0]), weight_version=1, tag="with-tokens"
    )
    key = client.put(
        ids[:100],
        num_experts=128,
        start=LARGE[0],
        tokens=range(LARGE[0], LARGE[0] + 100),
        weight_version=2,
        parent=first,
        tag="with-tokens",
    )
    assert key.continued_rows == LARGE[0]
    batch = client.materialize(
        [RoutedSequence(key, LARGE[0] + 101), RoutedSequence(None, 3)],
        on_missing="mask",
        tracks=["tokens"],
        where=where,  # type: ignore[arg-type]
    )
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [*range(LARGE[0] + 100), -1, -1, -1, -1]
    assert batch.weight_version.tolist() == [1] * LARGE[0] + [2] * 100 + [-1] * 4
    assert [(gap.index, gap.count, gap.reason) for gap in batch.missing] == [(1, 3, "NoRoutes")]
    assert client.materialize([RoutedSequence(key, 9)], where=where).tokens is None  # type: ignore[arg-type]
    assert client.release(tag="with-tokens") == 2
    nothing = client.materialize([RoutedSequence(None, 5)], on_missing="mask")
    assert nothing.ids.shape == (5, 4, 4)  # the served model's
    assert not nothing.valid.any()
