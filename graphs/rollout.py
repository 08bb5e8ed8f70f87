"""The full graph: HTTP edge, engine, decoder and store, for disaggregated RL."""

from pathlib import Path

from ray import serve
from ray.serve import Application

from serve_app.client.served import DECODER, ENGINE, INGRESS, STORE
from serve_app.config import RolloutArgs, read_args
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.gpus import check_gpus
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.deployments.routing.affinity import by_session
from serve_app.deployments.routing.placement import near_bytes
from serve_app.deployments.store import ExpertStore
from serve_app.ingress.app import http
from serve_app.ingress.edge.edge import Ingress


def build(args: RolloutArgs) -> Application:
    """Compose the application that `serve run graphs/rollout.yaml` serves."""
    check_gpus(args.engine)
    store = serve.deployment(name=STORE, **args.store.serve.deployment())(ExpertStore)
    engine = serve.deployment(
        name=ENGINE, request_router_config=by_session(args.engine), **args.engine.deployment()
    )(InferenceEngine)
    decoder = serve.deployment(
        name=DECODER,
        request_router_config=near_bytes(args.decoder),
        **args.decoder.serve.deployment(),
    )(ExpertDecoder)
    edge = serve.deployment(name=INGRESS, **args.ingress.serve.deployment())(
        serve.ingress(http)(Ingress)
    )
    supervisor = store.bind(args.store)
    return edge.bind(
        args.ingress,
        args.engine,
        engine.bind(args.engine, args.store, supervisor),
        decoder.bind(args.decoder, args.store, supervisor),
    )


def __getattr__(name: str) -> Application:
    """Compose ``app`` from the shipped config file, for `serve build graphs.rollout:app`."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    shipped = read_args(Path(__file__).with_suffix(".yaml"))
    return build(RolloutArgs.model_validate(shipped))
