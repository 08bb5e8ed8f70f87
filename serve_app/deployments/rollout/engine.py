"""The engine deployment: samples rollouts and turns their records into keys."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import ray
from ray.serve.handle import DeploymentHandle

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import application, connect_store, replica_id
from serve_app.deployments.metrics import EngineMetrics
from serve_app.deployments.ranks.group import RankGroup
from serve_app.deployments.rollout.loading import load_engine
from serve_app.deployments.rollout.shared_store import puts_itself, wait_for_shared_store
from serve_app.deployments.rollout.sleeping import SleepingParts
from serve_app.deployments.rollout.weights_inbox import PartialUpdates
from serve_app.deployments.sampling.own_engine import OwnEngine
from serve_app.deployments.sampling.rollouts import Load, Rollouts
from serve_app.deployments.store import ExpertStore
from serve_app.engines.base import ModelInfo
from serve_app.store.base import RecordStore
from serve_app.types import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    SleepLevel,
    UpdateMode,
    WeightsResult,
)
from serve_app.weights.holder import Newest, Published, newest_weights
from serve_app.weights.parts import BroadcastPart, GroupSpec, PickledPart

if TYPE_CHECKING:
    import torch


class InferenceEngine:
    """One engine replica. Every key it answers with reads on after this process is gone."""

    def __init__(
        self,
        args: EngineArgs,
        store_args: StoreArgs,
        store: DeploymentHandle[ExpertStore],
        load: Load = load_engine,
    ) -> None:
        self._args = args
        self._store_args = store_args
        self._supervisor = store
        if puts_itself(args):
            wait_for_shared_store(application(), store_args)
        self._rollouts: Rollouts
        if args.group.ranks > 1:
            self._rollouts = RankGroup(args, store_args, store, load, application())
        else:
            self._rollouts = OwnEngine(args, self._connect, load)
        self._parts = SleepingParts()
        self._updates = PartialUpdates(self._rollouts.inbox())
        self._metrics = EngineMetrics()
        self._ongoing = 0
        self._starting = asyncio.Lock()
        self._started = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end."""
        async with self._under_way() as begun:
            result = await self._rollouts.generate(request)
            self._metrics.finished(result, time.monotonic() - begun)
            return result

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout; the last chunk carries the whole result."""
        async with (
            self._under_way() as begun,
            aclosing(self._rollouts.stream(request)) as chunks,
        ):
            async for chunk in chunks:
                if chunk.result is not None:
                    self._metrics.finished(chunk.result, time.monotonic() - begun)
                yield chunk

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt; it is processed and its rows are stored once."""
        async with self._under_way() as begun:
            results = await self._rollouts.generate_group(request, n)
            for result in results:
                self._metrics.finished(result, time.monotonic() - begun)
            return results

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; return how many were under way here."""
        return await self._rollouts.abort(request_id)

    async def abandon(self, request_id: str, members: int = 0) -> None:
        """Abort a request whose client is gone, and release its key: nobody will ever read it."""
        await self._rollouts.abandon(request_id, members)

    async def update_weights(
        self, weights: Published, version: int, mode: UpdateMode
    ) -> WeightsResult:
        """Serve other weights from now on; the old ones stay if these do not fit."""
        await self._start()
        return await self._load(weights, version, mode)

    async def add_weights(self, part: PickledPart | BroadcastPart) -> int:
        """Take some of the tensors of an update that comes in parts; return how many."""
        return await self._updates.add(part)

    async def commit_weights(self, version: int, publisher: str) -> WeightsResult:
        """Serve what came in parts; the replica ``publisher`` keeps it for later replicas."""
        await self._start()
        return await self._updates.commit(version, publisher, self._serve_state)

    async def join_weights_group(
        self, spec: GroupSpec, replicas: Sequence[str], timeout_s: float
    ) -> None:
        """Join a trainer's process group; ``replicas`` are all, in the order of their ranks."""
        await self._updates.join(spec, replicas, timeout_s)

    async def leave_weights_group(self, name: str) -> None:
        """Leave a trainer's process group."""
        await self._updates.leave(name)

    async def sleep(self, level: SleepLevel) -> None:
        """Abort what runs and take the weights off the device; level 2 forgets them."""
        await self._rollouts.sleep(level)
        self._parts.fall_asleep()

    async def wake(self, tags: Sequence[str] = ()) -> None:
        """Serve again; weights that were forgotten are the newest ones, else the checkpoint's.

        With ``tags``, as LMDeploy's clients wake the weights first and then the cache, requests
        are refused until all of them are awake; weights may be updated in between.
        """
        asleep = self._parts.after_waking(tags)
        if "weights" not in asleep:
            await self._wake_weights()
        self._parts.asleep = asleep

    async def is_sleeping(self) -> bool:
        """Tell whether requests are refused until `wake`."""
        return bool(self._parts.asleep)

    async def _wake_weights(self) -> None:
        if self._rollouts.sleep_level == 2 and (newest := await _newest()):
            await self._rollouts.wake(newest.weights, newest.version)
        else:
            await self._rollouts.wake(None, 0)

    async def weight_version(self) -> tuple[str, int]:
        """Return this replica's name and the version that it samples with."""
        await self._start()
        return replica_id(), self._rollouts.weight_version

    async def ongoing(self) -> int:
        """Return how many requests and groups are under way here."""
        return self._ongoing

    async def info(self) -> ModelInfo:
        """Describe the served model."""
        return self._rollouts.info

    async def check_health(self) -> None:
        """Let Serve replace this replica when its engine is dead, or take none that fails."""
        await self._rollouts.ready()
        self._rollouts.check_health()

    async def _start(self) -> None:
        """Bring a replica that started late to the newest weights, before its first answer."""
        if self._started:
            return
        async with self._starting:
            if self._started:
                return
            if newest := await _newest():
                await self._load(newest.weights, newest.version, "drain")
            self._started = True

    async def _load(self, weights: Published, version: int, mode: UpdateMode) -> WeightsResult:
        begun = time.monotonic()
        await self._rollouts.update_weights(weights, version, mode)
        return self._took(version, begun)

    async def _serve_state(
        self, state: "Mapping[str, torch.Tensor]", version: int
    ) -> WeightsResult:
        begun = time.monotonic()
        await self._rollouts.serve_state(state, version)
        return self._took(version, begun)

    def _took(self, version: int, begun: float) -> WeightsResult:
        result = WeightsResult(replica_id(), version, time.monotonic() - begun)
        self._metrics.took_weights(result)
        return result

    @asynccontextmanager
    async def _under_way(self) -> AsyncIterator[float]:
        """Count a request that may be sampled; the time when it came."""
        begun = time.monotonic()
        await self._start()
        self._parts.check_awake()
        self._ongoing += 1
        try:
            yield begun
        finally:
            self._ongoing -= 1

    async def _connect(self) -> RecordStore:
        return await connect_store(self._store_args, self._supervisor)


async def _newest() -> Newest | None:
    return await newest_weights(application()) if ray.is_initialized() else None
