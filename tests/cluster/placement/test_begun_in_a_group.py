"""What an application keeps does not die with the placement group of whoever began it."""

import os
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.config import StoreArgs
from serve_app.store.owner.directory import open_directory, remove_actors
from serve_app.weights.holder import open_holder

APP = "begun-in-a-placement-group"


class Trainer:
    """As trainers place their workers: what these start goes into their group, too."""

    def begin(self) -> list[int]:
        kept: list[Any] = [open_directory(APP, StoreArgs(), 30), open_holder(APP, 30)]
        pids: list[int] = ray.get([one.__ray_call__.remote(_pid) for one in kept], timeout=60)
        return pids


def test_directory_and_weights_outlive_a_trainers_placement_group(cluster: Cluster) -> None:
    group = placement_group([{"CPU": 0.5}])
    ray.get(group.ready(), timeout=60)
    actor: Any = ray.remote(Trainer)
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    trainer = actor.options(num_cpus=0.5, scheduling_strategy=inside).remote()
    pids = ray.get(trainer.begin.remote(), timeout=60)
    remove_placement_group(group)
    kept: list[Any] = [open_directory(APP, StoreArgs(), 30), open_holder(APP, 30)]
    assert ray.get([one.__ray_call__.remote(_pid) for one in kept], timeout=60) == pids
    remove_actors(APP, 30)


def _pid(_: object) -> int:
    return os.getpid()
