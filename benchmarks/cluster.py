"""A Ray of the benchmark's own, with the store and the decoder served on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

from benchmarks.lines import only_lines
from serve_app.config import DecoderArgs, ServeOptions, StoreArgs
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.placement import near_bytes
from serve_app.deployments.store import ExpertStore
from serve_app.served import DECODER, STORE
from serve_app.store.directory import open_directory


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


def start(actor: type, *args: object) -> Any:
    """Start an actor that asks for no resources; it ends with its handle."""
    remote: Any = ray.remote(actor)
    return remote.options(num_cpus=0).remote(*args)


def serve_decoder(app: str) -> None:
    """Serve a store and one decoder replica as application ``app``; no HTTP."""
    store = StoreArgs()
    decoder = DecoderArgs(serve=ServeOptions(max_ongoing_requests=8))
    open_directory(app, store, store.call_timeout_s)
    serve.start(proxy_location="Disabled")
    supervisor = serve.deployment(name=STORE, **store.serve.deployment())(ExpertStore)
    served = serve.deployment(
        name=DECODER, request_router_config=near_bytes(decoder), **decoder.serve.deployment()
    )(ExpertDecoder)
    serve.run(served.bind(decoder, store, supervisor.bind(store)), name=app, route_prefix=None)
