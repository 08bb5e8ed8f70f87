"""Where the ranks of a group go: each beside its first worker, in the replica's bundles."""

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.config import EngineArgs
from serve_app.deployments.ranks.rank import GROUPS, EngineRank
from serve_app.engines.lmdeploy.workers.seat import Seat

_CALLS = 100_000
"""Calls of a rank at once; how many of them sample is the engine's to say."""


def place_ranks(args: EngineArgs, fields: tuple[Any, ...]) -> tuple[list[Any], list[Seat]]:
    """Start the rank actors of a replica's group and return them with their workers' seats.

    Raises ValueError outside a placement group, or in one with fewer GPU bundles.
    """
    group, shape = ray.util.get_current_placement_group(), args.group
    bundles = [] if group is None else group.bundle_specs
    own = [number for number, bundle in enumerate(bundles) if bundle.get("GPU")]
    if group is None or len(own) != shape.gpus:
        raise ValueError(
            f"expected the replica's placement group to have {shape.gpus} bundles with a GPU"
            f" (EngineArgs.deployment() asks for them), got {bundles}"
        )
    options: dict[str, Any] = {"concurrency_groups": GROUPS, "max_concurrency": _CALLS}
    actor = ray.remote(**options)(EngineRank)
    ranks, seats = [], []
    for rank in range(shape.ranks):
        mine = tuple(own[rank * shape.workers : (rank + 1) * shape.workers])
        seats.append(Seat(mine, rank))
        beside = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=mine[0], placement_group_capture_child_tasks=True
        )
        cpus = bundles[mine[0]].get("CPU", 0)
        ranks.append(
            actor.options(num_cpus=cpus, num_gpus=0, scheduling_strategy=beside).remote(
                args, *fields
            )
        )
    return ranks, seats
