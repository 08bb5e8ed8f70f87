"""The full graph behind Serve's proxy, as the HTTP benchmarks use it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve

from benchmarks.harness.cluster import own_ray
from benchmarks.harness.fast_engine import FastEngine
from examples.tiny_moe import write_checkpoint
from serve_app.client.served import DECODER, ENGINE, INGRESS, STORE
from serve_app.config import RolloutArgs
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.deployments.rollout.loading import load_engine
from serve_app.deployments.store import ExpertStore
from serve_app.ingress.app import http
from serve_app.ingress.edge.edge import Ingress

PORT = 8531
PROXY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.ingress.proxy.middlewares",
    "R3SERVE_PROXY_STALL_S": "5",
}


@contextmanager
def proxied_ray(object_store_bytes: int = 300 << 20, *, guarded: bool = True) -> Iterator[None]:
    """Start a Ray whose proxies have our middlewares, or none of them."""
    os.environ.update(PROXY)
    if not guarded:
        del os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    with own_ray(object_store_bytes):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield


@contextmanager
def served(
    app: str, *, fast: bool, replicas: int = 1, lease_s: float = 600, **ingress: Any
) -> Iterator[str]:
    """Serve the graph under its name as prefix; give its address."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(
            Path(folder), hidden=64, layers=4, experts=16, dense_layers=(1,), context=512
        )
        engine = {
            "model": str(model),
            "dtype": "float32",
            "max_batch_size": 64,
            "enable_return_routed_experts": True,
            "enable_transfer_obj_ref": True,
            "serve": {
                "min_replicas": replicas,
                "max_replicas": replicas,
                "num_cpus": 0.2,
                "max_ongoing_requests": 1024,
            },
        }
        edge = {"model_name": "policy", "access_log": False, "max_sampling": 640}
        edge |= {"serve": {"num_cpus": 0.05, "max_ongoing_requests": 768}, **ingress}
        store = {"lease_s": lease_s}
        args = RolloutArgs.model_validate({"engine": engine, "store": store, "ingress": edge})
        _run(app, args, fast=fast)
        yield f"http://127.0.0.1:{PORT}/{app}"
        serve.delete(app)


def _run(app: str, args: RolloutArgs, *, fast: bool) -> None:
    """As `graphs.rollout.build` does, but for the engine."""
    store = serve.deployment(name=STORE, **args.store.serve.deployment())(ExpertStore)
    engine = serve.deployment(name=ENGINE, **args.engine.deployment())(InferenceEngine)
    decoder = serve.deployment(name=DECODER, **args.decoder.serve.deployment())(ExpertDecoder)
    edge = serve.deployment(name=INGRESS, **args.ingress.serve.deployment())(
        serve.ingress(http)(Ingress)
    )
    supervisor = store.bind(args.store)
    load: Any = FastEngine if fast else load_engine
    bound = edge.bind(
        args.ingress,
        args.engine,
        engine.bind(args.engine, args.store, supervisor, load),
        decoder.bind(args.decoder, args.store, supervisor),
    )
    serve.run(bound, name=app, route_prefix=f"/{app}")
