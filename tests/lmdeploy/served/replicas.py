"""LMDeploy replicas and a store, served without CUDA: only who holds a model patches torch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve_app.client.served import ENGINE, STORE
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.ranks.group import RankGroup
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.deployments.rollout.loading import load_engine
from serve_app.deployments.routing.affinity import by_session
from serve_app.deployments.sampling.own_engine import OwnEngine
from serve_app.deployments.store import ExpertStore
from serve_app.engines.base import Engine, ModelInfo, TakeRows
from serve_app.engines.lmdeploy.workers.seat import ALONE, Seat
from serve_app.weights.holder import Published


def load_on_cpu(args: EngineArgs, take_rows: TakeRows | None, seat: Seat = ALONE) -> Engine:
    """Load an engine in a process that patches torch, and so do its workers."""
    from tests.lmdeploy.served.cpu_workers import CpuWorker

    return load_engine(args, take_rows, seat, CpuWorker)


class CpuEngine(InferenceEngine):
    """An engine replica on a machine without CUDA, and what only tests ask of it."""

    def __init__(
        self, args: EngineArgs, store_args: StoreArgs, store: DeploymentHandle[ExpertStore]
    ) -> None:
        super().__init__(args, store_args, store, load_on_cpu)

    async def prefix_hits(self) -> int:
        """Return how many prompt tokens came from this replica's prefix cache."""
        return sum(await self._each_engine(_prefix_hits))

    async def recomputed(self) -> int:
        """Return how many rollouts lost their blocks here."""
        return sum(await self._each_engine(_recomputed))

    async def limit(self, running: int, waiting: int, context_length: int) -> ModelInfo:
        """Serve as an engine with other limits would."""
        await self._each_engine(_limit, running, waiting, context_length)
        rollouts = self._rollouts
        if isinstance(rollouts, RankGroup):
            rollouts._info = replace(rollouts.info, context_length=context_length)
        return rollouts.info

    async def taken(self) -> tuple[int, bool]:
        """Return how many requests are here, and whether weights are being changed."""
        rollouts = self._rollouts
        if isinstance(rollouts, RankGroup):
            return self._ongoing, rollouts._changing.locked()
        engine: Any = cast(OwnEngine, rollouts).engine
        return self._ongoing, engine._slots._closed > 0

    async def sampled(self) -> dict[int, int]:
        """Return how many tokens each rank has sampled."""
        return dict(cast(RankGroup, self._rollouts).metrics.tokens)

    async def sleep_level(self) -> int | None:
        """Return how deep it sleeps."""
        return self._rollouts.sleep_level

    async def wake_with(self, weights: Published, version: int) -> None:
        """Wake it with weights of the caller's, as an engine can be."""
        await self._rollouts.wake(weights, version)
        self._parts.asleep = frozenset()

    async def actors(self) -> list[Any]:
        """Return the ranks, then the workers of this replica's group."""
        rollouts = self._rollouts
        if isinstance(rollouts, RankGroup):
            return [*rollouts._ranks, *rollouts._workers]
        return list(cast(Any, cast(OwnEngine, rollouts).engine).workers)

    async def _each_engine(self, function: Callable[..., int], *args: int) -> list[int]:
        rollouts = self._rollouts
        if isinstance(rollouts, OwnEngine):
            return [function(rollouts.engine, *args)]
        ranks = cast(RankGroup, rollouts)._ranks
        return [
            await rank.__ray_call__.remote(_of_rank, function, *args)  # Ray's own
            for rank in ranks
        ]


def build(engine_args: EngineArgs, store_args: StoreArgs) -> Application:
    """Compose engine and store as `graphs.rollout` does; no decoder, no HTTP."""
    store = serve.deployment(name=STORE, **store_args.serve.deployment())(ExpertStore)
    engine = serve.deployment(
        name=ENGINE, request_router_config=by_session(engine_args), **engine_args.deployment()
    )(CpuEngine)
    return engine.bind(engine_args, store_args, store.bind(store_args))


def members(app: str) -> list[Any]:
    """Return the ranks and workers of an application's only replica."""
    handle: Any = serve.get_deployment_handle(ENGINE, app)
    found: list[Any] = handle.actors.remote().result(timeout_s=30)
    return found


def pid_of(member: Any) -> int:
    """Return the process of a rank or worker."""
    pid: int = ray.get(member.__ray_call__.remote(_pid), timeout=30)
    return pid


def places(workers: list[Any]) -> list[tuple[str, str]]:
    """Return the node and the GPU of each worker."""
    found: list[tuple[str, str]] = ray.get(
        [worker.__ray_call__.remote(_place) for worker in workers], timeout=30
    )
    return found


def _of_rank(rank: Any, function: Callable[..., int], *args: int) -> int:
    return function(rank._engine, *args)


def _place(_: Any) -> tuple[str, str]:
    context = ray.get_runtime_context()
    return context.get_node_id(), ",".join(context.get_accelerator_ids()["GPU"])


def _pid(_: Any) -> int:
    import os

    return os.getpid()


def _prefix_hits(engine: Any) -> int:
    return int(engine._backend.engine.scheduler.block_trie.stats.num_hit_tokens)


def _recomputed(engine: Any) -> int:
    return int(engine.recomputed)


def _limit(engine: Any, running: int, waiting: int, context_length: int) -> int:
    from serve_app.engines.lmdeploy.slots import Limits
    from serve_app.engines.request_rules import RequestRules

    engine._slots._limits = Limits(running, waiting)
    engine._args = engine._args.model_copy(
        update={"max_batch_size": running, "max_waiting": waiting}
    )
    engine._info = replace(engine.info, context_length=context_length)
    engine._rules = RequestRules(engine.info, has_tokenizer=True)
    return running
