"""The driver of an engine group with several ranks: one `Rollouts` made of theirs."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.metrics import RankMetrics
from serve_app.deployments.ranks.choosing import Choice
from serve_app.deployments.ranks.placing import place_ranks
from serve_app.deployments.sampling.inboxes import WorkersInbox
from serve_app.deployments.sampling.rollouts import Load
from serve_app.deployments.store import ExpertStore
from serve_app.engines.base import ModelInfo
from serve_app.engines.lmdeploy.options import split_own
from serve_app.engines.lmdeploy.workers.watch import Watch
from serve_app.errors import EngineUnavailable, R3Error
from serve_app.types import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    SleepLevel,
    UpdateMode,
)
from serve_app.weights.holder import Published, pack
from serve_app.weights.parts import Inbox

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_CONTROL_S = 3600.0  # a drain waits for whatever still samples


class RankGroup:
    """Starts a group's ranks, spreads rollouts over them and changes all of them together.

    One rank that dies, stops or fails ends them all: the others would wait for it in every step.
    """

    def __init__(
        self,
        args: EngineArgs,
        store_args: StoreArgs,
        store: DeploymentHandle[ExpertStore],
        load: Load,
        app: str,
    ) -> None:
        if store_args.backend == "memory":
            raise ValueError("an engine group needs store.backend 'shards', got 'memory'")
        options = split_own(args.engine_kwargs)
        self._ranks, seats = place_ranks(args, (store_args, store, load, app))
        start_s = options.start_timeout_s
        self._watch = Watch("rank", self._ranks, start_s, options.liveness_timeout_s)
        try:
            meeting = ray.get(self._ranks[0].address.remote(), timeout=start_s)
            starting = [
                rank.start.remote(seat.meeting_at(meeting))
                for rank, seat in zip(self._ranks, seats, strict=True)
            ]
            infos = ray.get(starting, timeout=start_s)
            workers = ray.get([rank.workers.remote() for rank in self._ranks], timeout=start_s)
        except RayError as error:
            why = self._watch.failed
            self._watch.end()
            raise _typed(error, why) from error
        self._watch.up()
        self._info: ModelInfo = infos[0]
        self._workers = [worker for own in workers for worker in own]
        self._choice = Choice(len(self._ranks))
        self.metrics = RankMetrics()
        self._version = 0
        self._sleep_level: SleepLevel | None = None
        self._changing = asyncio.Lock()

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        return self._info

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses."""
        return self._version

    @property
    def sleep_level(self) -> SleepLevel | None:
        """How deep it sleeps, None while it serves."""
        return self._sleep_level

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout on one rank; the last chunk carries the whole result."""
        with self._choice.sampled(request) as rank:
            chunks, ended, tokens = self._ranks[rank].stream.remote(request), False, 0
            try:
                async for answer in chunks:
                    chunk = await self._answer(answer)
                    tokens += len(chunk.output_ids)
                    ended = chunk.result is not None
                    yield chunk
            except RayError as error:
                ended = True
                raise _typed(error, self._watch.failed) from None
            except Exception:
                ended = True  # refused, or lost: the id may be another request's
                raise
            finally:
                self.metrics.sampled(rank, tokens)
                if not ended:  # a rank runs ahead of its reader, and may have a key already
                    self._give_up(rank, chunks, request)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end, on one rank."""
        with self._choice.sampled(request) as rank:
            call = self._ranks[rank].generate.remote(request)
            result: GenerateResult = await self._awaited(rank, call, request)
            self.metrics.sampled(rank, len(result.output_ids))
            return result

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt on one rank, which has it cached."""
        with self._choice.sampled(request, n) as rank:
            call = self._ranks[rank].generate_group.remote(request, n)
            results: list[GenerateResult] = await self._awaited(rank, call, request, n)
            self.metrics.sampled(rank, sum(len(result.output_ids) for result in results))
            return results

    async def abort(self, request_id: str | None) -> int:
        """Abort one request, or all, on every rank; return how many rollouts ended."""
        return sum(await self._all("abort", request_id))

    async def abandon(self, request_id: str, members: int) -> None:
        """Abort a request whose client is gone, and release its keys."""
        await self._all("abandon", request_id, members)

    async def update_weights(self, weights: Published, version: int, mode: UpdateMode) -> None:
        """Serve published weights once all ranks rest; the old ones stay if these do not fit."""
        async with self._changing:
            await self._answer(self._ranks[0].check_weights.remote(weights))
            async with self._resting(abort=mode == "abort"):
                await self._all("load", weights, version)
                self._version = version

    async def serve_state(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Serve a state dict of this process, at once."""
        packed = await asyncio.to_thread(lambda: ray.put(pack(state)))
        await self.update_weights([packed], version, "abort")

    def inbox(self) -> Inbox:
        """Return where weights that come in parts are collected: all ranks' workers."""
        return WorkersInbox(self._workers)

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take all weights off their devices; level 2 forgets them."""
        await self._all("abort", None)
        async with self._changing:
            await self._all("sleep", level)
            self._sleep_level = max(level, self._sleep_level or level)

    async def wake(self, weights: "Published | None", version: int) -> None:
        """Serve again, with published weights if given."""
        async with self._changing:
            self._version = (await self._all("wake", weights, version))[0]
            self._sleep_level = None

    async def ready(self) -> None:
        """Ask every rank whether it can serve; raise `EngineUnavailable` where one cannot."""
        self.check_health()
        await self._all("check_health")

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once a rank of the group is lost."""
        if self._watch.failed is not None:
            raise EngineUnavailable(f"the engine group has failed: {self._watch.failed}")

    @asynccontextmanager
    async def _resting(self, *, abort: bool) -> AsyncIterator[None]:
        try:
            await self._all("rest", abort)
            yield
        finally:
            await self._all("go_on")

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """Call all ranks at once, to the end: they may wait for each other. Raise what one did."""
        # In nobody's context: new weights may come in the call of a rollout that is cancelled.
        asked = [Context().run(getattr(rank, method).remote, *args) for rank in self._ranks]
        waiting = asyncio.gather(*(self._answer(one) for one in asked), return_exceptions=True)
        try:
            async with asyncio.timeout(_CONTROL_S):
                answers = await asyncio.shield(waiting)
        except TimeoutError:
            raise EngineUnavailable(
                f"the ranks of an engine group did not all answer {method} in {_CONTROL_S:g} s"
            ) from None
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def _awaited(
        self, rank: int, answer: "ray.ObjectRef[T]", request: GenerateRequest, n: int = 0
    ) -> T:
        """Wait for what a rank samples; where nobody waits any more it ends there, too."""
        try:
            return await self._answer(answer)
        except asyncio.CancelledError:
            self._give_up(rank, answer, request, n)
            raise

    def _give_up(self, rank: int, answer: Any, request: GenerateRequest, n: int = 0) -> None:
        """End what a rank samples for nobody, and keys that it has made for nobody."""
        ray.cancel(answer)
        # Not as a part of the call that is being cancelled: Ray would cancel this, too.
        Context().run(self._ranks[rank].abandon.remote, request.request_id, n)

    async def _answer(self, answer: "ray.ObjectRef[T]") -> T:
        try:
            return await answer
        except RayError as error:
            raise _typed(error, self._watch.failed) from None


def _typed(error: RayError, failed: str | None) -> Exception:
    """Return a rank's own error, or what is known of a rank that is gone."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, (R3Error, ValueError)) else error
    why = failed or str(error).partition("\n")[0]
    return EngineUnavailable(f"the engine group has failed: {why}")
