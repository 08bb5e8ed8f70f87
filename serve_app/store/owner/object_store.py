"""How much of a node's object store a shard takes unless it is told."""

import ray

from serve_app.errors import StoreUnavailable


def default_budget(shard: str) -> int:
    """Return half of the object store of the node whose id starts with ``shard``, in bytes."""
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeID"].startswith(shard):
            return int(node["Resources"]["object_store_memory"]) // 2
    raise StoreUnavailable(f"no live node's id starts with {shard}")
