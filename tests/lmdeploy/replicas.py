"""The rollout graph with LMDeploy on a CPU: its replicas patch torch, nothing else does."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve_app.config import EngineArgs, RolloutArgs, StoreArgs
from serve_app.deployments.affinity import by_session
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.engine import InferenceEngine
from serve_app.deployments.store import ExpertStore
from serve_app.ingress.app import http
from serve_app.ingress.edge import Ingress
from serve_app.served import DECODER, ENGINE, INGRESS, STORE


class CpuEngine(InferenceEngine):
    """An engine replica on a machine without CUDA."""

    def __init__(
        self, args: EngineArgs, store_args: StoreArgs, store: DeploymentHandle[ExpertStore]
    ) -> None:
        import torch

        from tests.lmdeploy.cpu_backend import install

        torch.set_num_threads(1)
        install()
        super().__init__(args, store_args, store)

    async def prefix_hits(self) -> int:
        """Return how many prompt tokens came from this replica's prefix cache."""
        engine: Any = self._engine
        return int(engine._backend.engine.scheduler.block_trie.stats.num_hit_tokens)


def build(args: RolloutArgs) -> Application:
    """Compose what `graphs.rollout` does, with another class for the engine."""
    store = serve.deployment(name=STORE, **args.store.serve.deployment())(ExpertStore)
    engine = serve.deployment(
        name=ENGINE, request_router_config=by_session(), **args.engine.serve.deployment()
    )(CpuEngine)
    decoder = serve.deployment(name=DECODER, **args.decoder.serve.deployment())(ExpertDecoder)
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
