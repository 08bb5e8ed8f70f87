"""A cluster of three nodes whose GPUs nobody has: for groups whose workers compute on the CPU."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

ROOT = str(Path(__file__).parents[3])
TWO_NODES = (
    {"CPU": 1.0, "large": 1.0},
    {"GPU": 1.0, "CPU": 1.0, "large": 1.0},
    {"GPU": 1.0, "CPU": 1.0, "small": 1.0},
)
"""A group of two that spans both nodes with GPUs."""


@contextmanager
def pretended_gpus() -> Iterator[Cluster]:
    """Start the head without a GPU, ``large`` with four and ``small`` with two; and Serve.

    Their workers find the tests' modules by PYTHONPATH, and everything else as in production.
    """
    os.environ["PYTHONPATH"] = ROOT
    os.environ["LMDEPLOY_SKIP_WARMUP"] = "1"
    head = {"num_cpus": 6, "num_gpus": 0, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 200 << 20})
    for name in ("large", "small"):
        add_node(nodes, name)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(proxy_location="Disabled")
    try:
        yield nodes
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        nodes.shutdown()  # type: ignore[no-untyped-call]


def add_node(nodes: Cluster, name: str) -> Any:
    """Start one of the nodes with GPUs, again where it is gone."""
    gpus = {"large": 4, "small": 2}[name]
    return nodes.add_node(
        num_cpus=2 * gpus, num_gpus=gpus, resources={name: 100}, object_store_memory=200 << 20
    )


def remove_node(nodes: Cluster, name: str) -> None:
    """Kill one of the nodes with GPUs."""
    (found,) = (each for each in nodes.worker_nodes if name in each._ray_params.resources)
    nodes.remove_node(found, allow_graceful=False)


def shared_memory_used() -> int:
    """Return the bytes of objects in the stores of all nodes."""
    used = 0
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            at = node["NodeManagerAddress"], node["NodeManagerPort"]
            stats = node_stats(*at, False)  # type: ignore[no-untyped-call]
            used += int(stats.store_stats.object_store_bytes_used)
    return used
