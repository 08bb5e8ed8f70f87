"""A Ray of the benchmark's own, of one node or two, with store and decoder served on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.harness.lines import only_lines
from serve_app.client.served import DECODER, STORE
from serve_app.config import DecoderArgs, StoreArgs
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.routing.placement import near_bytes
from serve_app.deployments.store import ExpertStore
from serve_app.serve_options import ServeOptions
from serve_app.store.owner.directory import open_directory


@contextmanager
def own_ray(object_store_bytes: int) -> Iterator[None]:
    """Start a Ray that no other program on this machine shares, and end it afterwards."""
    ray.init(
        address="local",
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
    )
    with only_lines():
        try:
            yield
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


@contextmanager
def own_nodes(other: str, object_store_bytes: int) -> Iterator[None]:
    """Start two raylets, this process on the first; the second has the resource ``other``."""
    size: dict[str, Any] = {"num_cpus": 2, "object_store_memory": object_store_bytes}
    nodes = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    with only_lines():
        try:
            nodes.add_node(**size, resources={other: 100})
            ray.init(address=nodes.address, log_to_driver=False)
            try:
                yield
            finally:
                serve.shutdown()  # type: ignore[no-untyped-call]
                ray.shutdown()
        finally:
            nodes.shutdown()  # type: ignore[no-untyped-call]


def start(actor: type, *args: object, on: str | None = None) -> Any:
    """Start an actor that asks for no CPU, on any node or one with the resource ``on``.

    It ends with its handle.
    """
    remote: Any = ray.remote(actor)
    return remote.options(num_cpus=0, resources={on: 1} if on else None).remote(*args)


def serve_decoder(app: str, *, replicas: int = 1) -> None:
    """Serve a store and a decoder replica on each of so many nodes as ``app``; no HTTP."""
    store = StoreArgs()
    one_a_node = {"max_replicas_per_node": 1, "num_cpus": 0} if replicas > 1 else {}
    decoder = DecoderArgs(
        serve=ServeOptions(
            min_replicas=replicas, max_replicas=replicas, max_ongoing_requests=8, **one_a_node
        )
    )
    open_directory(app, store, store.call_timeout_s)
    serve.start(proxy_location="Disabled")
    supervisor = serve.deployment(name=STORE, **store.serve.deployment())(ExpertStore)
    served = serve.deployment(
        name=DECODER, request_router_config=near_bytes(decoder), **decoder.serve.deployment()
    )(ExpertDecoder)
    serve.run(served.bind(decoder, store, supervisor.bind(store)), name=app, route_prefix=None)
