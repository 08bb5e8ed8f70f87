"""LMDeploy replicas and a store, served without CUDA: only the replicas patch torch."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve_app.client.served import ENGINE, STORE
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.deployments.routing.affinity import by_session
from serve_app.deployments.store import ExpertStore


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


def build(engine_args: EngineArgs, store_args: StoreArgs) -> Application:
    """Compose engine and store as `graphs.rollout` does; no decoder, no HTTP."""
    store = serve.deployment(name=STORE, **store_args.serve.deployment())(ExpertStore)
    engine = serve.deployment(
        name=ENGINE, request_router_config=by_session(engine_args), **engine_args.serve.deployment()
    )(CpuEngine)
    return engine.bind(engine_args, store_args, store.bind(store_args))
