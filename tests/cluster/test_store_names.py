"""The names of a store's actors: free once it is removed, refused where somebody else has them."""

import numpy as np
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.errors import StoreUnavailable
from serve_app.store.access.client import connect
from serve_app.store.owner.directory import (
    list_actors,
    remove_actors,
    this_node,
)
from tests.cluster.nodes.actors import EngineLike, start
from tests.store_contract import SMALL, MakeStore, read, record


def test_a_store_that_nobody_runs_is_named(cluster: object) -> None:
    with pytest.raises(StoreUnavailable, match="nobody"):
        connect("nobody")


@pytest.mark.parametrize("kind", ["directory", "shard"])
def test_a_store_opens_while_the_one_before_it_is_removed(make_store: MakeStore, kind: str) -> None:
    other = start(EngineLike, "elsewhere")
    name = this_node() if kind == "shard" else kind
    for seed in range(3):
        make_store(app="again")
        key = connect("again").put(record(SMALL, seed=seed))
        np.testing.assert_array_equal(
            read(connect("again"), key)[0].ids, record(SMALL, seed=seed).ids
        )
        late = connect("again")  # has looked for no shard yet
        ray.get(other.kill.remote("again", name))  # Ray still finds it here, by its name
        if kind == "shard":
            late.put(record(SMALL))


def test_removal_ends_when_the_names_are_free(make_store: MakeStore) -> None:
    for seed in range(2):
        store = make_store(app="again")
        key = store.put(record(SMALL, seed=seed))
        np.testing.assert_array_equal(read(store, key)[0].ids, record(SMALL, seed=seed).ids)
        assert remove_actors("again", 30) == 2
        assert not list_actors("again")


def test_a_foreign_actor_under_a_shards_name_is_refused(make_store: MakeStore) -> None:
    store = make_store(app="squatted")

    @ray.remote(num_cpus=0)
    class Squatter:
        def ping(self) -> str:
            return "pong"

    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"squatted/{this_node()}", "namespace": "r3serve"}
    squatter = Squatter.options(scheduling_strategy=node, **options).remote()  # type: ignore[attr-defined]
    assert ray.get(squatter.ping.remote()) == "pong"
    with pytest.raises(StoreUnavailable, match=r"squatted|answer"):
        store.put(record())
    ray.kill(squatter)
