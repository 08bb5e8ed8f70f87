"""Store and decoder alone, beside engines and trainers that somebody else runs."""

from ray import serve
from ray.serve import Application

from serve_app.client.served import DECODER, STORE
from serve_app.config import StoreGraphArgs
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.routing.placement import near_bytes
from serve_app.deployments.store import ExpertStore


def build(args: StoreGraphArgs) -> Application:
    """Compose the application that `serve run graphs/store.yaml` serves; it has no HTTP route."""
    store = serve.deployment(name=STORE, **args.store.serve.deployment())(ExpertStore)
    decoder = serve.deployment(
        name=DECODER,
        request_router_config=near_bytes(args.decoder),
        **args.decoder.serve.deployment(),
    )(ExpertDecoder)
    return decoder.bind(args.decoder, args.store, store.bind(args.store))
