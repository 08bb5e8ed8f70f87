"""``shared_store``: upstream's actor, called as LMDeploy and xtuner call it, over our shards."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from graphs.store import build
from serve_app import RoutedExpertsClient, RoutedSequence
from serve_app.config import StoreArgs, StoreGraphArgs
from serve_app.errors import RecordError, StoreUnavailable
from serve_app.materialize import materialize
from serve_app.store.access.compat import open_compat
from serve_app.store.owner.directory import find_compat
from tests.cluster.conftest import Open
from tests.cluster.nodes.actors import pid_of
from tests.cluster.test_cli import output
from tests.distinct_ids import distinct_ids
from tests.eventually import eventually
from tests.store_contract import LARGE, SMALL, MakeStore, expire, read, record


@pytest.fixture
def upstreams(cluster: Cluster) -> Iterator[Any]:
    """An actor of somebody else's under the name, in the namespace ``sglang``."""

    @ray.remote(num_cpus=0)
    class SharedStore:
        def put(self, data: object) -> str:
            return "hex"

    options = {"name": "shared_store", "namespace": "sglang", "lifetime": "detached"}
    actor: Any = SharedStore.options(**options).remote()  # type: ignore[attr-defined]
    assert ray.get(actor.put.remote(1)) == "hex"
    yield actor
    ray.kill(actor)


def routes(shape: tuple[int, int, int] = LARGE, dtype: str = "uint16", seed: int = 0) -> Any:
    ids: npt.NDArray[Any] = distinct_ids(shape, 128, seed).astype(dtype)
    return ids


def is_gone(namespace: str) -> bool:
    with suppress(ValueError):
        ray.get_actor("shared_store", namespace=namespace)
        return False
    return True


async def test_values_and_dtype_come_back_as_they_were(open_store: Open) -> None:
    _, actor = open_store()
    arrays = [
        routes(shape, dtype, seed)
        for seed, shape in enumerate([SMALL, LARGE, SMALL])
        for dtype in ("uint8", "uint16", "int32", ">u2", "int64")
    ]
    for array in arrays:
        array[:, 0] = np.iinfo(array.dtype).max  # what LMDeploy leaves in dense layers
    keys = await asyncio.gather(*(actor.put.remote(array) for array in arrays))
    got = await asyncio.gather(*(actor.get.remote(key) for key in keys))
    for before, after in zip(arrays, got, strict=True):
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)


def test_a_key_reads_again_within_the_grace_time_and_not_after(open_store: Open) -> None:
    store, actor = open_store(compat_grace_s=2.0)
    small, large, unread = (
        ray.get(actor.put.remote(routes(shape))) for shape in (SMALL, LARGE, LARGE)
    )
    for key, shape in ((small, SMALL), (large, LARGE)):
        for _ in range(2):
            np.testing.assert_array_equal(ray.get(actor.get.remote(key)), routes(shape))
    expire(store, keys=1)
    for key in (small, large):
        with pytest.raises(KeyError, match="KeyExpired"):
            ray.get(actor.get.remote(key))
    np.testing.assert_array_equal(ray.get(actor.get.remote(unread)), routes())


def test_clear_drops_only_what_was_put_through_the_actor(open_store: Open) -> None:
    store, actor = open_store()
    ours, ours_read = store.put(record(LARGE)), store.put(record(SMALL), tag="step-1")
    unread, reread = (ray.get(actor.put.remote(routes(seed=seed))) for seed in range(2))
    np.testing.assert_array_equal(ray.get(actor.get.remote(ours_read)), record(SMALL).ids)
    ray.get(actor.get.remote(reread))
    assert ray.get(actor.clear.remote()) is None
    for key in (unread, reread):
        with pytest.raises(KeyError, match="KeyReleased"):
            ray.get(actor.get.remote(key))
    np.testing.assert_array_equal(read(store, ours)[0].ids, record(LARGE).ids)
    np.testing.assert_array_equal(read(store, ours_read)[0].ids, record(SMALL).ids)
    assert store.release(tag="step-1") == 1


def test_a_cached_handle_survives_a_killed_process_and_the_keys_with_it(open_store: Open) -> None:
    store, cached = open_store(compat_grace_s=3.0)
    kept, reread = (ray.get(cached.put.remote(routes(seed=seed))) for seed in range(2))
    ray.get(cached.get.remote(reread))
    killed = pid_of(cached)
    os.kill(killed, signal.SIGKILL)
    after = ray.get(cached.put.remote(routes(seed=9)), timeout=60)
    assert pid_of(cached) != killed
    for seed, key in ((0, kept), (9, after)):
        np.testing.assert_array_equal(ray.get(cached.get.remote(key)), routes(seed=seed))
    expire(store, keys=0)
    with pytest.raises(KeyError, match="KeyExpired"):
        ray.get(cached.get.remote(reread))
    last = ray.get(cached.put.remote(routes(seed=2)))
    ray.get(cached.clear.remote())
    with pytest.raises(KeyError, match="KeyReleased"):
        ray.get(cached.get.remote(last))


def test_a_key_of_ours_reads_as_its_whole_sequence_and_then_ends(open_store: Open) -> None:
    store, actor = open_store(compat_grace_s=0.5)
    parent = store.put(record(LARGE, seed=1))
    child = store.put(record((8, 48, 8), start=600, seed=2), parent=parent)
    whole = np.concatenate([record(LARGE, seed=1).ids, record((8, 48, 8), seed=2).ids])
    np.testing.assert_array_equal(ray.get(actor.get.remote(child)), whole)
    expire(store, keys=1)
    orphan = store.put(record((8, 48, 8), start=600, seed=2))
    with pytest.raises(ValueError, match="RoutesGap: row 0"):
        ray.get(actor.get.remote(orphan))


def test_what_was_read_makes_room_for_a_put_that_waits(open_store: Open) -> None:
    store, actor = open_store(
        byte_budget=2 * routes().nbytes, put_timeout_s=20.0, compat_grace_s=600.0
    )
    unread, reread = (ray.get(actor.put.remote(routes(seed=seed))) for seed in range(2))
    ray.get(actor.get.remote(reread))
    ray.get(actor.put.remote(routes(seed=3)), timeout=15)
    with pytest.raises(KeyError, match="KeyReleased"):
        ray.get(actor.get.remote(reread))
    assert store.stats().live_bytes == 2 * routes().nbytes
    np.testing.assert_array_equal(ray.get(actor.get.remote(unread)), routes(seed=0))


def test_a_full_store_says_so_in_words_that_everybody_can_read(open_store: Open) -> None:
    _, actor = open_store(byte_budget=routes().nbytes, put_timeout_s=0.2)
    ray.get(actor.put.remote(routes()))
    with pytest.raises(RuntimeError, match="StoreFull"):
        ray.get(actor.put.remote(routes()))


def test_nothing_is_materialized_from_an_array_of_unknown_experts(open_store: Open) -> None:
    store, actor = open_store()
    key = ray.get(actor.put.remote(routes()))
    with pytest.raises(RecordError, match="shared_store"):
        materialize(store, [RoutedSequence(key, length=601)])
    np.testing.assert_array_equal(read(store, key)[0].ids, routes())


def test_somebody_elses_shared_store_is_refused_by_name(
    make_store: MakeStore, upstreams: Any
) -> None:
    make_store(app="late")
    with pytest.raises(StoreUnavailable, match=r"'sglang' is not ours but Actor\(.*SharedStore"):
        open_compat("late", "sglang", StoreArgs())
    assert ray.get(upstreams.put.remote(1)) == "hex"


def test_another_applications_shared_store_is_refused_by_name(
    open_store: Open, make_store: MakeStore
) -> None:
    _, actor = open_store()
    make_store(app="second")
    with pytest.raises(StoreUnavailable, match="belongs to application 'compat'"):
        open_compat("second", "lmdeploy", StoreArgs())
    assert find_compat("second", "lmdeploy") is None
    np.testing.assert_array_equal(
        ray.get(actor.get.remote(ray.get(actor.put.remote(routes())))), routes()
    )


def test_destroy_removes_it(open_store: Open, cluster: Cluster, tmp_path: Path) -> None:
    _, actor = open_store()
    ray.get(actor.put.remote(routes()))
    said = output(["r3serve", "store", "destroy", "compat", "--address", cluster.address], tmp_path)
    assert "removed 3 actors" in said
    assert eventually(lambda: is_gone("lmdeploy")), "shared_store is still there"


def test_it_leaves_with_its_application_once_no_shard_is_left(open_store: Open) -> None:
    store, actor = open_store(leave_after_s=0.5)
    key = ray.get(actor.put.remote(routes()))
    tick = threading.Event()
    for _ in range(30):  # far longer than an actor that nobody needs would stay
        assert not tick.wait(0.1)
        assert not is_gone("lmdeploy")
    store.release([key])
    assert eventually(lambda: is_gone("lmdeploy")), "shared_store did not leave"


def test_the_store_graph_opens_what_it_is_told_and_closes_the_rest(cluster: Cluster) -> None:
    def deploy(*namespaces: str) -> None:
        store = StoreArgs.model_validate({"compat_actors": namespaces})
        serve.run(build(StoreGraphArgs(store=store)), name="beside", route_prefix=None)

    deploy("lmdeploy", "sglang")
    try:
        kept: Any = ray.get_actor("shared_store", namespace="sglang")
        dropped: Any = ray.get_actor("shared_store", namespace="lmdeploy")
        keys = [ray.get(actor.put.remote(routes())) for actor in (kept, dropped)]
        deploy("sglang")
        assert eventually(lambda: is_gone("lmdeploy")), "shared_store is still in lmdeploy"
        for key in keys:
            np.testing.assert_array_equal(RoutedExpertsClient("beside").get(key).ids, routes())
            np.testing.assert_array_equal(ray.get(kept.get.remote(key)), routes())
    finally:
        serve.delete("beside")
        for actor in filter(None, (find_compat("beside", name) for name in ("lmdeploy", "sglang"))):
            ray.kill(actor)
