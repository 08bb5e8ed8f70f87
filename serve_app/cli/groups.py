"""Engine groups in words: what a configuration asks for, and what a cluster has for them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve_app.cli.machine import Finding, Verdict
from serve_app.cli.serve_config import ServedApplication
from serve_app.client.served import ENGINE
from serve_app.config import EngineArgs
from serve_app.deployments.gpus import unplaceable
from serve_app.deployments.nodes import Node, amounts, lacking, replicas_on, total
from serve_app.group_shape import sizes_given
from serve_app.serve_options import ServeOptions

_REPLICA = "SERVE_REPLICA::"
_SHORT = 10  # characters of a node's name


def group_text(args: EngineArgs) -> str:
    """Say how many groups an engine has, and of what size."""
    serve, many = args.serve, f"{args.serve.max_replicas}"
    if serve.min_replicas < serve.max_replicas:
        many = f"{serve.min_replicas}-{many}"
    where = (
        "on one node" if args.placed.strategy == "STRICT_PACK" else "on as few nodes as it takes"
    )
    replicas = "replica" if many == "1" else "replicas"
    return (
        f"{many} {replicas} of {args.group.gpus} GPUs each ({sizes_given(args.engine_kwargs)}),"
        f" {where}"
    )


def engines(application: ServedApplication) -> Iterator[EngineArgs]:
    """Yield the arguments of an application's engines."""
    for _, part in application.args or ():
        if isinstance(part, EngineArgs):
            yield part


def room_for(
    app: str, args: EngineArgs, nodes: Sequence[Node], free: Sequence[Node], more_come: bool
) -> Finding:
    """Judge whether a cluster has room for an engine's replicas; ``free``: what is left of it."""
    most, least = args.serve.max_replicas, args.serve.min_replicas
    what = f"engine of {app}"
    asked = f"{amounts(total(args.placed.bundles))} a replica"
    if not args.group.alone:
        asked = group_text(args)
    if lack := unplaceable(args, nodes):
        verdict: Verdict = "warning" if more_come else "wrong"
        return Finding(what, verdict, f"{asked}: no room for one", lack)
    placed = replicas_on(args.placed, nodes, most)
    now = len(replicas_on(args.placed, free, most))
    found = f"{asked}: room for {len(placed)} ({_where(placed)}), now free for {now}"
    if len(placed) >= most:
        return Finding(what, "ok", found)
    few: Verdict = "wrong" if len(placed) < least and not more_come else "warning"
    asks = f"min_replicas {least}" if len(placed) < least else f"max_replicas {most}"
    return Finding(what, few, found, f"more nodes, or less than {asks}")


def placed_groups(table: Mapping[str, Mapping[str, Any]], nodes: Sequence[Node]) -> list[Finding]:
    """Say of each replica with a placement group of its own where it is, or what it waits for."""
    return [
        _placed(group, nodes)
        for group in table.values()
        if group["name"].startswith(_REPLICA) and group["state"] != "REMOVED"
    ]


def serving(applications: Mapping[str, Any]) -> Iterator[Finding]:
    """Say how the engines of the served applications are, from `ray.serve.status`."""
    for name, application in applications.items():
        engine = application.deployments.get(ENGINE)
        if engine is None:
            continue
        states = ", ".join(f"{count} {state}" for state, count in engine.replica_states.items())
        found = f"{engine.status}, replicas: {states or 'none'}"
        well = engine.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
        yield Finding(f"serving {name}", "ok" if well else "warning", found, engine.message)


def _placed(group: Mapping[str, Any], nodes: Sequence[Node]) -> Finding:
    bundles = list(group["bundles"].values())
    what = f"replica {group['name'].removeprefix(_REPLICA)}"
    found = f"{group['state']}: {amounts(total(bundles))}"
    if group["state"] == "CREATED":
        on = sorted({node for node in group["bundles_to_node_id"].values() if node})
        return Finding(what, "ok", f"{found} on {_where([on])}")
    asked = ServeOptions(
        num_cpus=0,
        placement_group_bundles=tuple(bundles),
        placement_group_strategy="STRICT_PACK" if group["strategy"] == "STRICT_PACK" else "PACK",
    )
    advice = lacking(asked, nodes) or "the nodes have that, but not free: wait, or free some"
    return Finding(what, "warning", found, advice)


def _where(replicas: Sequence[Sequence[str]]) -> str:
    """Name the nodes of replicas, and how many are on each."""
    counts: dict[str, int] = {}
    for nodes in replicas:
        name = " and ".join(node[:_SHORT] for node in nodes)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{n} on {name}" if n > 1 else name for name, n in counts.items())
