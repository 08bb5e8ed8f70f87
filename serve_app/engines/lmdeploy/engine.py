"""The LMDeploy engine: LMDeploy's PyTorch engine 0.18 in process, behind the `Engine` Protocol."""

import asyncio
from collections.abc import (
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy import PytorchEngineConfig

from serve_app.config import EngineArgs
from serve_app.engines.answering import AnsweringEngine
from serve_app.engines.base import TakeRows
from serve_app.engines.lmdeploy.backend import Backend
from serve_app.engines.lmdeploy.finishing import to_its_end
from serve_app.engines.lmdeploy.model import ServedModel
from serve_app.engines.lmdeploy.options import LmdeployOptions
from serve_app.engines.lmdeploy.probe import probe
from serve_app.engines.lmdeploy.rollout import Rollout
from serve_app.engines.lmdeploy.slots import Limits, Slots
from serve_app.engines.lmdeploy.weights import ModelWeights
from serve_app.engines.lmdeploy.workers.seat import ALONE, Seat
from serve_app.engines.stream import ChunkStream
from serve_app.errors import EngineAsleep, EngineUnavailable, StoreUnavailable
from serve_app.types import GenerateRequest, SleepLevel, UpdateMode

if TYPE_CHECKING:
    import torch

    from serve_app.engines.lmdeploy.workers.worker import GroupWorker

STOPPED = "the engine was stopped"
ASLEEP = "the engine sleeps: call wake() first"


class LmdeployEngine(AnsweringEngine[Rollout]):
    """Loads a checkpoint and serves it on the event loop that it is made or first used on."""

    def __init__(
        self,
        args: EngineArgs,
        model: ServedModel,
        options: LmdeployOptions,
        config: PytorchEngineConfig,
        take_rows: TakeRows | None = None,
        seat: Seat = ALONE,
        worker: "type[GroupWorker] | None" = None,
    ) -> None:
        self._options = options
        self._take_rows = take_rows
        self._prefixes = config.enable_prefix_caching
        self._weights = ModelWeights(Path(args.model))
        self._backend = Backend(args.model, config, options, seat, worker)
        longest = min(model.info.context_length, self._backend.context_length)
        info = replace(model.info, context_length=longest)
        super().__init__(args, info, has_tokenizer=model.decode is not None)
        self._recorded = info if args.enable_return_routed_experts else None
        self._eos_ids = model.eos_ids
        self._decode = model.decode
        self._threads = ThreadPoolExecutor(2, "r3serve-lmdeploy")
        limits = Limits(args.max_batch_size, args.max_waiting)
        self._slots = Slots(self._backend, limits, self._recorded, self._taken, self._threads)
        self._slots.close()  # until the probe request is through
        self._starting: asyncio.Task[None] | None = None
        self._started = False
        self._abandoned: set[asyncio.Task[int]] = set()
        self._changing = asyncio.Lock()
        self._asleep = False
        self._ended: str | None = None
        if _has_loop():
            self._start()

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses; 0 as loaded."""
        return self._slots.weight_version

    @property
    def failed(self) -> str | None:
        """Why it serves nothing any more, None while it may."""
        return self._ended

    @property
    def workers(self) -> "list[Any]":
        """The actors that hold the model, in the order of their ranks; none where it is here."""
        return self._backend.workers

    @property
    def recomputed(self) -> int:
        """How many rollouts lost their blocks and were processed once more.

        Their records hold the experts of the first pass, the one that was sampled from.
        """
        return self._slots.recomputed

    async def ready(self) -> None:
        """Wait until the probe request is through; raise `EngineUnavailable` where it failed."""
        await asyncio.shield(self._start())
        self._check_not_ended()

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; when this returns their slots are free."""
        return await self._slots.abort(request_id)

    async def update_weights(
        self, state: "Mapping[str, torch.Tensor]", version: int, mode: UpdateMode
    ) -> None:
        """Serve ``state`` from now on; see `Engine`. What waits is served by the new weights."""
        if not self._started:
            await self.ready()
        self._check_serving()
        taken = self._weights.checked(state)
        async with self.resting(abort=mode == "abort"):
            self._check_serving()
            await self._load(self._weights.buckets(taken), version)

    def check_weights(self, state: "Mapping[str, torch.Tensor]") -> None:
        """Raise `WeightsMismatch` where ``state`` does not fit."""
        self._check_serving()
        self._weights.checked(state)

    async def load(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Serve ``state`` once this engine rests no more, `resting` now; see `Stepping`."""
        self._check_serving()
        await self._load(self._weights.buckets(self._weights.checked(state)), version)

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take weights and cache off the device; see `Engine`."""
        if not self._started:
            await self.ready()
        self._check_not_ended()
        self._fall_asleep()
        await self._slots.abort(None)
        async with self.resting(abort=True):
            self._fall_asleep()  # again: a wake that was under way may have ended
            if (self._sleep_level or 0) < level:
                await self._backend.sleep(level)
                self._sleep_level = level

    async def wake(
        self, state: "Mapping[str, torch.Tensor] | None" = None, version: int = 0
    ) -> None:
        """Serve again; see `Engine`. Nothing happens where it serves already."""
        async with self._changing:
            self._check_not_ended()
            if self._sleep_level is None:
                return
            taken = None if state is None else self._weights.checked(state)
            await self._backend.wake(["weights"])
            if taken is not None:
                await self._load(self._weights.buckets(taken), version)
            elif self._sleep_level == 2:
                await self._load(self._weights.stored(), 0)
            await self._backend.wake(["kv_cache"])
            self._sleep_level, self._asleep = None, False
            self._slots.open()

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once the engine has ended or is stuck, and say why."""
        self._check_not_ended()
        if self._started:
            self._backend.check_health(self._slots.busy)

    async def stop(self) -> None:
        """Abort everything, end the engine's tasks and free the model. Idempotent."""
        if self._ended == STOPPED:
            return
        if self._starting is not None:
            await asyncio.wait([self._starting])
        self._ended = STOPPED
        self._slots.close()
        await self._slots.abort(None)
        async with self._changing:
            await self._backend.stop()
        self._threads.shutdown()

    def _submit(
        self, requests: Sequence[GenerateRequest], filled: asyncio.Event, group: str | None
    ) -> list[Rollout]:
        """See `AnsweringEngine`.

        With a prefix cache the members of a group wait for the first one's prompt, and share its
        blocks; without one LMDeploy processes the prompt for each of them.
        """
        self._check_serving()
        rollouts = [self._rollout(one, ChunkStream(filled), group) for one in requests]
        if self._prefixes:
            for member in rollouts[1:]:
                member.leader = rollouts[0]
        self._slots.submit(rollouts)
        self._start()
        return rollouts

    def _rollout(self, request: GenerateRequest, stream: ChunkStream, group: str | None) -> Rollout:
        eos_ids = frozenset() if request.ignore_eos else self._eos_ids
        return Rollout(
            request,
            stream,
            stop_ids=eos_ids.union(request.stop_token_ids),
            max_new_tokens=self._rules.most_new_tokens(request),
            decode=self._decode,
            group=group,
        )

    def _abandon(self, rollouts: Iterable[Rollout]) -> None:
        ending = asyncio.create_task(self._slots.end(list(rollouts)))
        self._abandoned.add(ending)
        ending.add_done_callback(self._abandoned.discard)

    @asynccontextmanager
    async def resting(self, *, abort: bool) -> AsyncIterator[None]:
        """Let nothing start, end what runs or wait for it, and keep others from doing the same."""
        self._slots.close()
        try:
            if abort:
                await self._slots.abort_running()
            async with self._changing:
                if self._sleep_level is None:
                    await self._slots.drain()
                yield
        finally:
            self._slots.open()

    async def _load(
        self, buckets: "Iterable[list[tuple[str, torch.Tensor]]]", version: int
    ) -> None:
        """Load checked weights to the end, whoever waits for it; a half-loaded model is dead."""
        loop = asyncio.get_running_loop()
        try:
            await to_its_end(loop.run_in_executor(self._threads, self._backend.load, buckets))
            self._backend.flush_prefixes()
        except Exception as failure:
            self._fail(f"loading weights version {version} failed half-way: {failure}")
            raise EngineUnavailable(self._ended) from failure
        self._slots.weight_version = version

    def _start(self) -> "asyncio.Task[None]":
        if self._starting is None:
            self._starting = asyncio.create_task(self._begin(), context=Context())
        return self._starting

    async def _begin(self) -> None:
        """Start the engine's loop and prove that it works; only then do requests run."""
        try:
            self._backend.start(self._fail)
            async with asyncio.timeout(self._options.step_timeout_s):
                await probe(self._backend, self._info, self._recorded is not None, self._taken)
            self._backend.flush_prefixes()
        except EngineUnavailable as why:
            self._fail(str(why))
        except Exception as failure:  # noqa: BLE001  (whatever it is, it cannot serve)
            self._fail(f"LMDeploy failed the probe request: {type(failure).__name__}: {failure}")
        else:
            self._started = True
            self._slots.open()

    async def _taken(self, rows: Any) -> Any:
        """Return rows as an array; LMDeploy may have put them and given their key."""
        if not isinstance(rows, str):
            return rows
        if self._take_rows is None:
            raise StoreUnavailable(f"nobody here can read {rows}, which LMDeploy put by itself")
        return await self._take_rows(rows)

    def _fall_asleep(self) -> None:
        if not self._asleep:
            self._asleep = True
            self._slots.close()

    def _fail(self, why: str) -> None:
        """Serve nothing any more, and tell everybody who waits."""
        self._ended = self._ended or why
        self._slots.fail(why)

    def _check_serving(self) -> None:
        self._check_not_ended()
        if self._asleep:
            raise EngineAsleep(ASLEEP)

    def _check_not_ended(self) -> None:
        if self._ended is not None:
            raise EngineUnavailable(self._ended)


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
