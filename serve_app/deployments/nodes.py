"""Which nodes have room for a replica. Knows no Ray: a node is its name and its resources."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from serve_app.serve_options import ServeOptions

Resources = Mapping[str, float]

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Node:
    """One node, with what it has of each resource, or what of that is free."""

    name: str
    resources: Resources


def total(many: Iterable[Resources]) -> dict[str, float]:
    """Add resources up."""
    sums: dict[str, float] = {}
    for one in many:
        for kind, amount in one.items():
            sums[kind] = sums.get(kind, 0) + amount
    return sums


def amounts(resources: Resources, kinds: Iterable[str] | None = None) -> str:
    """Name resources in words, GPUs first: ``4 GPU and 5 CPU``."""
    wanted = resources if kinds is None else kinds
    order = sorted(wanted, key=lambda kind: (kind != "GPU", kind != "CPU", kind))
    parts = [f"{resources.get(kind, 0):g} {kind}" for kind in order]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts) or "nothing"


def replicas_on(serve: ServeOptions, nodes: Sequence[Node], most: int = 1) -> list[list[str]]:
    """Return the nodes of each replica that finds room, beside each other, ``most`` of them."""
    room = {node.name: dict(node.resources) for node in nodes}
    found: list[list[str]] = []
    while len(found) < most and (taken := _placed(serve, room)):
        for name, bundle in taken:
            room[name] = _less(room[name], bundle)
        found.append(sorted({name for name, _ in taken}))
    return found


def lacking(serve: ServeOptions, nodes: Sequence[Node]) -> str:
    """Say what the nodes lack for one replica, and nothing where they have it."""
    if replicas_on(serve, nodes):
        return ""
    asked = total(serve.bundles)
    if _on_one_node(serve):
        largest = max(nodes, key=lambda node: _size(node, asked), default=Node("none", {}))
        there = amounts(largest.resources, asked)
        return f"expected {amounts(asked)} on one node, the largest has {there}"
    *_, least = sorted(serve.bundles, key=lambda bundle: bundle.get("GPU", 0))
    there = amounts(total(node.resources for node in nodes), asked)
    rooms = sum(_times(least, node.resources) for node in nodes)
    return (
        f"expected {amounts(asked)} over the nodes, {amounts(least)} of it together for each GPU;"
        f" they have {there}, with room for {rooms} such"
    )


def _on_one_node(serve: ServeOptions) -> bool:
    return len(serve.bundles) == 1 or serve.strategy == "STRICT_PACK"


def _placed(
    serve: ServeOptions, room: Mapping[str, Resources]
) -> list[tuple[str, Resources]] | None:
    """Lay one replica's bundles onto nodes, or return None where they do not fit."""
    if _on_one_node(serve):
        asked: Resources = total(serve.bundles)
        name = next((name for name in room if _times(asked, room[name])), None)
        return None if name is None else [(name, asked)]
    driver, *workers = serve.bundles
    for name in room:  # equal workers fit wherever there is room, so only the driver is tried out
        if _times(driver, room[name]):
            left = {**room, name: _less(room[name], driver)}
            if (rest := list(_spread(workers, left))) and len(rest) == len(workers):
                return [(name, driver), *rest]
    return None


def _spread(
    bundles: list[dict[str, float]], room: dict[str, Resources]
) -> Iterator[tuple[str, Resources]]:
    """Lay bundles down one by one, large ones first, each where the least is left."""
    for bundle in sorted(bundles, key=lambda one: (-one.get("GPU", 0), -one.get("CPU", 0))):
        fit = [name for name in room if _times(bundle, room[name])]
        if not fit:
            return
        name = min(fit, key=lambda one: (room[one].get("GPU", 0), room[one].get("CPU", 0)))
        room[name] = _less(room[name], bundle)
        yield name, bundle


def _size(node: Node, kinds: Resources) -> tuple[float, float, float]:
    have = node.resources
    return have.get("GPU", 0), have.get("CPU", 0), sum(have.get(kind, 0) for kind in kinds)


def _times(asked: Resources, there: Resources) -> int:
    """How often ``asked`` fits into ``there``; nothing that is asked for is 0."""
    wanted = {kind: amount for kind, amount in asked.items() if amount}
    often = [(there.get(kind, 0) + _ROUNDING) / amount for kind, amount in wanted.items()]
    return int(min(often, default=1))


def _less(there: Resources, taken: Resources) -> dict[str, float]:
    return {kind: amount - taken.get(kind, 0) for kind, amount in there.items()}
