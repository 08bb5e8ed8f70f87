"""Six raylets, each with a resource of its own name, and the bytes that came to each."""

from typing import Any

import ray
import requests
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster


class Nodes:
    """The cluster, by what its nodes are for."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args=_HEAD)
        self.raylets: dict[str, Any] = {}
        for name in ("engines-1", "engines-2", "decoders", "trainers-1", "trainers-2"):
            self.add(name)

    def add(self, name: str) -> None:
        """Start a raylet."""
        self.raylets[name] = self.cluster.add_node(**_node(name, cpus=1))

    def remove(self, name: str, gracefully: bool) -> None:
        """Drain a raylet, or kill it."""
        self.cluster.remove_node(self.raylets.pop(name), allow_graceful=gracefully)

    def written(self) -> dict[str, int]:
        """Return the bytes written so far into each node's object store, copies included."""
        found = {}
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                stats = node_stats(  # type: ignore[no-untyped-call]
                    node["NodeManagerAddress"], node["NodeManagerPort"], False
                )
                name = next(name for name in node["Resources"] if name.startswith(_PREFIXES))
                found[name] = int(stats.store_stats.cumulative_created_bytes)
        return found

    def received(self) -> dict[str, float]:
        """Return the bytes of objects that each node has exported to have got from others."""
        found = {}
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            at = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            lines = requests.get(at, timeout=10).text.splitlines()
            here = [line for line in lines if line.startswith(_OBJECTS) and _RECEIVED in line]
            name = next(name for name in node["Resources"] if name.startswith(_PREFIXES))
            found[name] = sum(float(line.rpartition(" ")[2]) for line in here)
        return found


_OBJECTS, _RECEIVED = "ray_object_manager_bytes{", 'Type="Received"'
_PREFIXES = ("head", "engines", "decoders", "trainers")


def _node(name: str, cpus: int) -> dict[str, Any]:
    return {
        "num_cpus": cpus,
        "resources": {name: 100},
        "object_store_memory": 160 << 20,
        "include_dashboard": False,
    }


_HEAD = {
    **_node("head", cpus=0),
    "_system_config": {"metrics_report_interval_ms": 1000},  # of 10,000
}
