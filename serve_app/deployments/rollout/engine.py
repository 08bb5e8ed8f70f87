"""The engine deployment: samples rollouts and turns their records into keys."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import ray
from ray.serve.handle import DeploymentHandle

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import application, connect_store, replica_id
from serve_app.deployments.metrics import EngineMetrics
from serve_app.deployments.rollout.answer import Answer
from serve_app.deployments.rollout.handing_out import HandingOut
from serve_app.deployments.rollout.loading import load_engine
from serve_app.deployments.rollout.routes import Earlier, RouteKeys
from serve_app.deployments.rollout.shared_store import puts_itself, wait_for_shared_store
from serve_app.deployments.rollout.sleeping import SleepingParts
from serve_app.deployments.rollout.unread import Unread
from serve_app.deployments.rollout.weights_inbox import PartialUpdates
from serve_app.deployments.store import ExpertStore
from serve_app.engines.base import Engine, ModelInfo, Proving
from serve_app.errors import InvalidRequest
from serve_app.store.base import RecordStore
from serve_app.types import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    SleepLevel,
    UpdateMode,
    WeightsResult,
)
from serve_app.weights.holder import Newest, Published, newest_weights, unpack
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
        load: Callable[..., Engine] = load_engine,
    ) -> None:
        self._args = args
        self._store_args = store_args
        self._supervisor = store
        self._keys = RouteKeys(self._connect)
        if puts_itself(args):
            wait_for_shared_store(application(), store_args)
        self._engine = load(args, self._keys.take)
        self._unread = Unread()
        self._handing_out = HandingOut(args, self._keys, self._unread)
        self._parts = SleepingParts()
        self._updates = PartialUpdates()
        self._metrics = EngineMetrics()
        self._ongoing = 0
        self._starting = asyncio.Lock()
        self._started = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end."""
        async with aclosing(self.stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.result is not None:
                    return chunk.result
        raise AssertionError("a stream ends with a result")

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout; the last chunk carries the whole result."""
        begun = time.monotonic()
        await self._prepare(request)
        answer, result = Answer(request), None
        async with (
            self._looking_up(request) as earlier,
            aclosing(self._engine.generate(request)) as chunks,
        ):
            async for chunk in chunks:
                await earlier
                answer.add(chunk)
                if chunk.finish_reason is not None:
                    result = answer.result(await self._handing_out.hand_out(answer, await earlier))
                    self._metrics.finished(result, time.monotonic() - begun)
                yield GenerateChunk(
                    request.request_id, chunk.token_ids, chunk.logprobs, chunk.text, result
                )

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt; it is processed and its rows are stored once."""
        begun = time.monotonic()
        await self._prepare(request)
        found: dict[int, Answer] = {}
        async with (
            self._looking_up(request) as earlier,
            aclosing(self._engine.generate_group(request, n)) as chunks,
        ):
            async for index, chunk in chunks:
                await earlier
                found.setdefault(index, Answer(request.member(index))).add(chunk)
            answers = [found[index] for index in range(n)]
            routes = await self._handing_out.hand_out_group(request, answers, await earlier)
        results = [answer.result(one) for answer, one in zip(answers, routes, strict=True)]
        for result in results:
            self._metrics.finished(result, time.monotonic() - begun)
        return results

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; return how many were under way here."""
        return await self._engine.abort(request_id)

    async def abandon(self, request_id: str, members: int = 1) -> None:
        """Abort a request whose client is gone, and release its key: nobody will ever read it."""
        await self._engine.abort(request_id)
        ids = [request_id, *(f"{request_id}-{index}" for index in range(members))]
        keys = [key for one in ids if (key := self._unread.abandon(one))]
        if keys:
            await self._keys.release(keys)

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
        return await self._updates.commit(version, publisher, self._take)

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
        await self._engine.sleep(level)
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
        if self._engine.sleep_level == 2 and (newest := await _newest()):
            state = await asyncio.to_thread(unpack, newest.weights)
            await self._engine.wake(state, newest.version)
        else:
            await self._engine.wake()

    async def weight_version(self) -> tuple[str, int]:
        """Return this replica's name and the version that it samples with."""
        await self._start()
        return replica_id(), self._engine.weight_version

    async def ongoing(self) -> int:
        """Return how many requests and groups are under way here."""
        return self._ongoing

    async def info(self) -> ModelInfo:
        """Describe the served model."""
        return self._engine.info

    async def check_health(self) -> None:
        """Let Serve replace this replica when its engine is dead, or take none that fails."""
        if isinstance(self._engine, Proving):
            await self._engine.ready()
        self._engine.check_health()

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
        state = await asyncio.to_thread(unpack, weights)
        return await self._take(state, version, mode, begun)

    async def _take(
        self,
        state: "Mapping[str, torch.Tensor]",
        version: int,
        mode: UpdateMode = "abort",
        begun: float | None = None,
    ) -> WeightsResult:
        begun = begun or time.monotonic()
        await self._engine.update_weights(state, version, mode)
        result = WeightsResult(replica_id(), version, time.monotonic() - begun)
        self._metrics.took_weights(result)
        return result

    async def _prepare(self, request: GenerateRequest) -> None:
        """Check a request as far as this process can tell, before anything is sampled."""
        await self._start()
        self._parts.check_awake()
        self._engine.check(request)
        self._unread.begins(request.request_id)
        if request.continue_from is not None and not self._args.enable_transfer_obj_ref:
            raise InvalidRequest(
                "continue_from takes and makes keys, but enable_transfer_obj_ref is off in this"
                " engine's configuration"
            )

    @asynccontextmanager
    async def _looking_up(
        self, request: GenerateRequest
    ) -> AsyncIterator["asyncio.Task[Earlier | None]"]:
        """Look up what a request continues while its prompt is processed.

        Nothing is answered before the task is done: it raises what is wrong with the key.
        """
        task = asyncio.create_task(self._earlier(request))
        self._ongoing += 1
        try:
            yield task
        finally:
            self._ongoing -= 1
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # seen, even if sampling failed first

    async def _earlier(self, request: GenerateRequest) -> Earlier | None:
        if request.continue_from is None:
            return None
        return await self._keys.earlier(
            request.continue_from, request.input_ids, self._engine.info, request.on_divergence
        )

    async def _connect(self) -> RecordStore:
        return await connect_store(self._store_args, self._supervisor)


async def _newest() -> Newest | None:
    return await newest_weights(application()) if ray.is_initialized() else None
