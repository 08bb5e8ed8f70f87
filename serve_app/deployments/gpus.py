"""Are there the GPUs that an engine's replicas ask for? Serve itself would wait for ever."""

import logging
from collections.abc import Sequence

import ray
from ray._private.state import available_resources_per_node, state
from ray.serve.exceptions import RayServeException

from serve_app.config import EngineArgs
from serve_app.deployments.nodes import Node, lacking, total
from serve_app.group_shape import sizes_given

NODE_GROUP = "ray.io/node-group"
"""The label of a node that KubeRay or Ray's cluster launcher brought; more may be on their way."""

_log = logging.getLogger(__name__)


def check_gpus(args: EngineArgs) -> None:
    """Raise `RayServeException` where a replica finds no room, now or when scaled up.

    Of that alone Serve shows the bare message, and no traceback. Where nodes come by themselves
    what is lacking is logged: nothing tells from here how large they will be.
    """
    if not ray.is_initialized() or not args.gpus_per_replica:
        return
    if not (lack := unplaceable(args, live_nodes())):
        return
    later = state.get_max_resources_from_cluster_config() or {}
    if later.get("GPU", 0) >= args.gpus_per_replica:
        return
    if nodes_come():
        _log.warning("%s; serving begins when such nodes have come", lack)
        return
    raise RayServeException(lack)


def unplaceable(args: EngineArgs, nodes: Sequence[Node]) -> str:
    """Say what the nodes lack for one replica and what to do, and nothing where they have it."""
    serve, needed = args.placed, args.gpus_per_replica
    if not (lack := lacking(serve, nodes)):
        return ""
    here = total(node.resources for node in nodes).get("GPU", 0)
    said = f"engine.serve asks for {needed:g} GPU a replica and this cluster has {here:g}"
    if not here:
        return (
            f"{said}: start Ray on a machine with GPUs, or take graphs/rollout.yaml, whose engine"
            f" runs on CPUs ({lack})"
        )
    if args.group.alone:
        return f"{said}: {lack}. Give a node more of that, or engine.serve less"
    sizes = sizes_given(args.engine_kwargs)
    if serve.strategy == "PACK":
        return f"{said}: {lack} ({sizes}). Choose smaller sizes, or more nodes"
    if lacking(serve.model_copy(update={"placement_group_strategy": "PACK"}), nodes):
        return f"{said}: {lack} ({sizes}). Choose smaller sizes, or larger nodes"
    return (
        f"{said}: {lack} ({sizes}). Choose smaller sizes, larger nodes, or"
        f" engine.serve.placement_group_strategy PACK, which lets a group span nodes"
    )


def live_nodes(free: bool = False) -> list[Node]:
    """Return the connected cluster's nodes; ``free``: with what nobody has taken there."""
    left = available_resources_per_node() if free else {}  # type: ignore[no-untyped-call]
    return [
        Node(each["NodeID"], left.get(each["NodeID"], {}) if free else each["Resources"])
        for each in ray.nodes()  # type: ignore[no-untyped-call]
        if each["Alive"]
    ]


def nodes_come() -> bool:
    """Whether something brings nodes to this cluster, as KubeRay and the autoscaler do."""
    return any(
        each["Alive"] and NODE_GROUP in each["Labels"]
        for each in ray.nodes()  # type: ignore[no-untyped-call]
    )
