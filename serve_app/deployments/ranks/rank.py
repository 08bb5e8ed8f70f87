"""One data parallel rank of an engine group: an actor with an engine and its way to the store."""

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

import ray
from ray.serve.handle import DeploymentHandle

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import connect_store
from serve_app.deployments.sampling.own_engine import OwnEngine
from serve_app.deployments.sampling.rollouts import Load
from serve_app.deployments.store import ExpertStore
from serve_app.engines.base import ModelInfo, Stepping
from serve_app.engines.lmdeploy.workers.address import Address, free_address
from serve_app.engines.lmdeploy.workers.seat import Seat
from serve_app.engines.lmdeploy.workers.watch import LIVENESS
from serve_app.store.base import RecordStore
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult, SleepLevel
from serve_app.weights.holder import Published, unpack

GROUPS = {LIVENESS: 1}


class EngineRank:
    """Sits beside its first worker, so that its records lie on the node that made them.

    Weights are changed in three calls that the group's driver makes to all ranks at once: `rest`,
    `load`, `go_on`. A rank that loaded while another still stepped would lend it new experts.
    """

    def __init__(
        self,
        args: EngineArgs,
        store_args: StoreArgs,
        store: DeploymentHandle[ExpertStore],
        load: Load,
        app: str,
    ) -> None:
        self._args = args
        self._store = store_args, store, app
        self._load = load
        self._own: OwnEngine | None = None
        self._wrong: str | None = None
        self._rest: tuple[asyncio.Task[None], AsyncExitStack] | None = None

    @ray.method(concurrency_group=LIVENESS)
    def alive(self) -> str | None:
        """Answer, whatever the event loop does; say why this rank serves nothing any more."""
        return self._wrong if self._own is None else self._engine.failed

    async def address(self) -> Address:
        """Return an address of this node where ranks can meet."""
        return free_address()

    async def start(self, seat: Seat) -> ModelInfo:
        """Load this rank's engine; returns once all ranks have met and theirs serve.

        A rank that cannot says so to the watch, too: the others would wait for it.
        """
        load = functools.partial(self._load, seat=seat)
        try:
            self._own = OwnEngine(self._args, self._connect, load)
        except Exception as error:
            self._wrong = f"it cannot start: {type(error).__name__}: {error}"
            raise
        await self._own.ready()
        return self._own.info

    async def workers(self) -> list[Any]:
        """Return the actors of this rank's GPUs."""
        return self._engine.workers

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout; see `Rollouts`."""
        async with aclosing(self._rollouts.stream(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end; see `Rollouts`."""
        return await self._rollouts.generate(request)

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt; see `Rollouts`."""
        return await self._rollouts.generate_group(request, n)

    async def abort(self, request_id: str | None) -> int:
        """Abort one request, or all, of this rank; return how many rollouts ended."""
        return await self._rollouts.abort(request_id)

    async def abandon(self, request_id: str, members: int) -> None:
        """Abort a request whose client is gone, and release its keys."""
        await self._rollouts.abandon(request_id, members)

    async def check_weights(self, weights: Published) -> None:
        """Raise `WeightsMismatch` where published weights do not fit."""
        self._engine.check_weights(await asyncio.to_thread(unpack, weights))

    async def rest(self, abort: bool) -> None:
        """Let nothing start, and end what runs or wait for it, until `go_on`."""
        stack = AsyncExitStack()
        coming = stack.enter_async_context(self._engine.resting(abort=abort))
        rest = asyncio.create_task(coming)
        self._rest = rest, stack
        await rest

    async def load(self, weights: Published, version: int) -> None:
        """Serve published weights after the rest; raise `WeightsMismatch` before any is loaded."""
        await self._engine.load(await asyncio.to_thread(unpack, weights), version)

    async def go_on(self) -> None:
        """End the rest, also one that is still to come: its driver waits no more. Idempotent."""
        if self._rest is None:
            return
        (rest, stack), self._rest = self._rest, None
        rest.cancel()
        await asyncio.wait([rest])
        await stack.aclose()

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take the weights off the device; returns when all ranks do so."""
        await self._rollouts.sleep(level)

    async def wake(self, weights: "Published | None", version: int) -> int:
        """Serve again, with published weights if given; return the version that it serves."""
        await self._rollouts.wake(weights, version)
        return self._rollouts.weight_version

    async def check_health(self) -> None:
        """Raise `EngineUnavailable` once this rank can serve no more."""
        self._rollouts.check_health()

    async def _connect(self) -> RecordStore:
        return await connect_store(*self._store)

    @property
    def _rollouts(self) -> OwnEngine:
        assert self._own is not None, "start() comes first"
        return self._own

    @property
    def _engine(self) -> Stepping:
        return cast(Stepping, self._rollouts.engine)
