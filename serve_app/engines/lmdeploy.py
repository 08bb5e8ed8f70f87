"""The LMDeploy engine: LMDeploy's PyTorch engine 0.18 in process, behind the `Engine` Protocol."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lmdeploy.messages import ResponseType

from serve_app.config import EngineArgs
from serve_app.engines.base import EngineChunk, ModelInfo
from serve_app.engines.lmdeploy_backend import Backend
from serve_app.engines.lmdeploy_model import ServedModel
from serve_app.engines.lmdeploy_options import EngineOptions, engine_config
from serve_app.engines.lmdeploy_probe import NEW_TOKENS, check_routes, probe_prompt
from serve_app.engines.lmdeploy_rollout import Rollout
from serve_app.engines.lmdeploy_sampling import MOST_TEMPERATURE, generation_config
from serve_app.engines.lmdeploy_weights import ModelWeights
from serve_app.engines.stream import ChunkStream
from serve_app.errors import (
    EngineAsleep,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    R3Error,
)
from serve_app.records import Record
from serve_app.types import FinishReason, GenerateRequest, SleepLevel, UpdateMode

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

STOPPED = "the engine was stopped"
ASLEEP = "the engine sleeps: call wake() first"
SEED_RANGE = range(-(2**63), 2**64)


class LmdeployEngine:
    """Loads a checkpoint and serves it on the event loop that it is made or first used on.

    Raises ValueError for arguments that LMDeploy fails.
    """

    def __init__(self, args: EngineArgs, model: ServedModel, options: EngineOptions) -> None:
        self._args = args
        self._own = options.own
        self._decode = model.decode
        self._eos_ids = model.eos_ids
        config = engine_config(args, options, model.info.context_length)
        self._weights = ModelWeights(Path(args.model))
        self._backend = Backend(args.model, config)
        longest = min(model.info.context_length, self._backend.context_length)
        self._info = replace(model.info, context_length=longest)
        self._threads = ThreadPoolExecutor(2, "r3serve-lmdeploy")
        self._live: dict[str, Rollout] = {}
        self._queue: deque[Rollout] = deque()
        self._running: dict[Rollout, asyncio.Task[None]] = {}
        self._cancels: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        self._started = False
        self._updates = 0
        self._changing = asyncio.Lock()
        self._sleep_level: SleepLevel | None = None
        self._asleep = False
        self._version = 0
        self._ended: str | None = None
        self.recomputed = 0
        if _has_loop():
            self._start()

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        return self._info

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses; 0 as loaded."""
        return self._version

    @property
    def sleep_level(self) -> SleepLevel | None:
        """How deep it sleeps, None while it serves."""
        return self._sleep_level

    async def ready(self) -> None:
        """Wait until the probe request is through; raise `EngineUnavailable` where it failed."""
        self._start()
        assert self._starting is not None
        await asyncio.shield(self._starting)
        self._check_not_ended()

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a request that this model can never serve."""
        prompt, info = request.input_ids, self._info
        if not prompt:
            raise InvalidRequest("expected at least one prompt token, got none")
        self._check_vocabulary("input_ids", (min(prompt), max(prompt)))
        self._check_vocabulary("stop_token_ids", request.stop_token_ids)
        self._check_vocabulary("logit_bias", request.logit_bias)
        if len(prompt) >= info.context_length:
            raise InvalidRequest(
                f"expected at most {info.context_length - 1} prompt tokens, one less than the"
                f" context length {info.context_length}, got {len(prompt)}"
            )
        if request.stop and self._decode is None:
            raise InvalidRequest(
                "stop strings need the checkpoint's tokenizer, and it has none; use stop_token_ids"
            )
        if "" in request.stop:
            raise InvalidRequest("expected stop strings that are not empty, got ''")
        if request.seed is not None and request.seed not in SEED_RANGE:
            raise InvalidRequest(
                f"expected a seed in [{SEED_RANGE.start}, {SEED_RANGE.stop}), got {request.seed}"
            )
        if request.temperature > MOST_TEMPERATURE:
            raise InvalidRequest(
                f"LMDeploy expects a temperature up to {MOST_TEMPERATURE:g},"
                f" got {request.temperature:g}"
            )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineChunk, None]:
        """Sample one rollout; see `Engine`. Raises when the iteration begins."""
        async with aclosing(self._sample([request], None)) as chunks:
            async for _, chunk in chunks:
                yield chunk

    async def generate_group(
        self, request: GenerateRequest, n: int
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        """Sample ``n`` rollouts of one prompt; see `Engine`. Raises when the iteration begins."""
        most = self._args.max_batch_size + self._args.max_waiting
        if not 1 <= n <= most:
            raise InvalidRequest(f"expected a group of 1 to {most} rollouts, got {n}")
        members = [request.member(index) for index in range(n)]
        async with aclosing(self._sample(members, request.request_id)) as chunks:
            async for index, chunk in chunks:
                yield index, chunk

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; when this returns their slots are free."""
        return await self._end(
            [
                rollout
                for rollout in self._live.values()
                if request_id is None or request_id in (rollout.request.request_id, rollout.group)
            ]
        )

    async def update_weights(
        self, state: "Mapping[str, torch.Tensor]", version: int, mode: UpdateMode
    ) -> None:
        """Serve ``state`` from now on; see `Engine`. What waits is served by the new weights."""
        self._check_serving()
        taken = self._weights.check(state)
        async with self._alone(abort=mode == "abort"):
            self._check_serving()
            await self._load(self._weights.buckets(taken), version)

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take weights and cache off the device; see `Engine`."""
        self._check_not_ended()
        self._asleep = True
        await self._end(list(self._live.values()))
        async with self._alone(abort=True):
            self._asleep = True
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
            taken = None if state is None else self._weights.check(state)
            await self._backend.wake(["weights"])
            if taken is not None:
                await self._load(self._weights.buckets(taken), version)
            elif self._sleep_level == 2:
                await self._load(self._weights.stored(), 0)
            await self._backend.wake(["kv_cache"])
            self._sleep_level, self._asleep = None, False
        self._fill()

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once the engine has ended or is stuck, and say why."""
        self._check_not_ended()
        if self._started:
            self._backend.check_health(bool(self._running), self._own.step_timeout_s)

    async def stop(self) -> None:
        """Abort everything, end the engine's tasks and free the model. Idempotent."""
        if self._ended == STOPPED:
            return
        if self._starting is not None:
            await asyncio.wait([self._starting])
        self._ended = STOPPED
        await self._end(list(self._live.values()))
        async with self._changing:
            await self._backend.stop()
        self._threads.shutdown()

    # Requests.

    async def _sample(
        self, requests: Sequence[GenerateRequest], group: str | None
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        for request in requests:
            self.check(request)
        filled = asyncio.Event()
        rollouts = [self._rollout(request, ChunkStream(filled), group) for request in requests]
        self._submit(rollouts)
        live = dict(enumerate(rollouts))
        try:
            while live:
                await filled.wait()
                filled.clear()
                for index, rollout in list(live.items()):
                    if chunk := rollout.stream.take():
                        if chunk.finish_reason is not None:
                            del live[index]
                        yield index, chunk
        finally:
            if live:
                ending = asyncio.create_task(self._abandon(list(live.values())))
                self._cancels.add(ending)
                ending.add_done_callback(self._cancels.discard)

    def _rollout(self, request: GenerateRequest, stream: ChunkStream, group: str | None) -> Rollout:
        room = self._info.context_length - len(request.input_ids)
        eos_ids = frozenset() if request.ignore_eos else self._eos_ids
        return Rollout(
            request,
            stream,
            stop_ids=eos_ids.union(request.stop_token_ids),
            max_new_tokens=min(request.max_new_tokens, room),
            decode=self._decode,
            group=group,
        )

    def _submit(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts of one prompt, all or none."""
        self._check_serving()
        ids = {rollout.request.request_id for rollout in rollouts}
        if used := self._live.keys() & ids:
            raise InvalidRequest(f"request id {min(used)!r} is already in use")
        running, waiting = self._args.max_batch_size, self._args.max_waiting
        if len(self._live) + len(ids) > running + waiting:
            raise EngineOverloaded(
                f"at most {running} requests run and {waiting} wait;"
                f" there are {len(self._live)}, and {len(ids)} came"
            )
        for rollout in rollouts:
            self._live[rollout.request.request_id] = rollout
        self._queue.extend(rollouts)
        self._start()
        self._fill()

    def _fill(self) -> None:
        """Start what waits, as far as there is room and nothing else must happen first."""
        if not self._started or self._updates or self._asleep or self._ended:
            return
        while self._queue and len(self._running) < self._args.max_batch_size:
            rollout = self._queue.popleft()
            self._running[rollout] = asyncio.create_task(self._drive(rollout))

    async def _drive(self, rollout: Rollout) -> None:
        """Run one rollout to its end; its slot is free before its record is made."""
        rows = None
        rollout.weight_version = self._version
        try:
            rows = await self._run(rollout)
        except Exception as failure:  # noqa: BLE001  (whatever LMDeploy raises belongs to its reader)
            rollout.end("error", f"LMDeploy failed: {type(failure).__name__}: {failure}")
        finally:
            del self._running[rollout]
            self._fill()
        await self._finish(rollout, rows)

    async def _run(self, rollout: Rollout) -> Any:
        if rollout.aborted:
            rollout.end("abort")
            return None
        request = rollout.request
        config = generation_config(
            request,
            stop_ids=rollout.stop_ids,
            max_new_tokens=rollout.max_new_tokens,
            routes=self._records(request),
            padding=self._backend.padding,
        )
        session = rollout.session_id = self._backend.open_session()
        rows, cancelled = None, False
        outputs = self._backend.run(session, request.input_ids, config)
        async with aclosing(outputs):
            async for out in outputs:
                rollout.take(out.token_ids, out.logprobs)
                rows = out.rows
                if out.status is not ResponseType.SUCCESS:
                    rollout.end(*_ending(out.status))
                elif rollout.ending is not None and not cancelled:
                    cancelled = True  # its rows come with the last output
                    await self._backend.cancel(session)
        self.recomputed += self._backend.recomputed(session) > 0
        return rows

    async def _finish(self, rollout: Rollout, rows: Any) -> None:
        """Make the record, which copies and checks all rows, and send the last chunk."""
        record: Record | None = None
        try:
            if rows is not None and self._records(rollout.request):
                record = await self._in_thread(rollout.record, rows, self._info)
        except R3Error as error:
            rollout.fail(f"the routed experts that LMDeploy gave are wrong: {error}")
        finally:
            del self._live[rollout.request.request_id]
            rollout.close(record)

    async def _end(self, rollouts: Sequence[Rollout]) -> int:
        """Abort rollouts and wait until their slots are free; return how many that ended."""
        ended = [rollout for rollout in rollouts if rollout.ending is None]
        await asyncio.gather(*(self._cancel(rollout) for rollout in ended))
        await asyncio.gather(*(rollout.done.wait() for rollout in ended))
        return len(ended)

    async def _abandon(self, rollouts: Sequence[Rollout]) -> None:
        """End rollouts whose reader is gone."""
        await self._end(rollouts)

    async def _cancel(self, rollout: Rollout) -> None:
        rollout.aborted = True
        if rollout in self._running:
            if rollout.session_id is not None:
                await self._backend.cancel(rollout.session_id)
        elif rollout in self._queue:
            self._queue.remove(rollout)
            rollout.end("abort")
            await self._finish(rollout, None)

    # Weights.

    def _alone(self, *, abort: bool) -> "_Alone":
        return _Alone(self, abort=abort)

    async def _load(
        self, buckets: "Iterable[list[tuple[str, torch.Tensor]]]", version: int
    ) -> None:
        """Load checked weights to the end, whoever waits for it; a half-loaded model is dead."""
        try:
            await _uncancelled(self._in_thread(self._backend.load, buckets))
            self._backend.flush_prefixes()
        except Exception as failure:
            self._fail(f"loading weights version {version} failed half-way: {failure}")
            raise EngineUnavailable(self._ended) from failure
        self._version = version

    # Life.

    def _start(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._begin())

    async def _begin(self) -> None:
        """Start the engine's loop and prove that it works; only then do requests run."""
        try:
            self._backend.start()
            async with asyncio.timeout(self._own.step_timeout_s):
                await self._probe()
        except EngineUnavailable as why:
            self._fail(str(why))
        except Exception as failure:  # noqa: BLE001  (whatever it is, it cannot serve)
            self._fail(f"LMDeploy failed the probe request: {type(failure).__name__}: {failure}")
        else:
            self._started = True
            self._fill()

    async def _probe(self) -> None:
        prompt = probe_prompt(self._info, self._eos_ids)
        request = GenerateRequest(
            input_ids=prompt, max_new_tokens=NEW_TOKENS, temperature=0, return_routed_experts=True
        )
        config = generation_config(
            request,
            stop_ids=(),
            max_new_tokens=NEW_TOKENS,
            routes=self._records(request),
            padding=0,
        )
        session = self._backend.open_session()
        outputs = [out async for out in self._backend.run(session, prompt, config)]
        self._backend.recomputed(session)
        if outputs[-1].status is not ResponseType.FINISH:
            raise EngineUnavailable(f"LMDeploy ended the probe request with {outputs[-1].status}")
        if self._records(request):
            check_routes(outputs[-1].rows, len(prompt) + NEW_TOKENS - 1, self._info)
        self._backend.flush_prefixes()

    def _fail(self, why: str) -> None:
        """Serve nothing any more, and tell everybody who waits."""
        self._ended = self._ended or why
        while self._queue:
            rollout = self._queue.popleft()
            rollout.end("error", why)
            del self._live[rollout.request.request_id]
            rollout.close(None)

    def _records(self, request: GenerateRequest) -> bool:
        return self._args.enable_return_routed_experts and request.return_routed_experts

    def _check_vocabulary(self, what: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequest(
                    f"expected {what} in [0, {self._info.vocab_size}), got {token}"
                )

    def _check_serving(self) -> None:
        self._check_not_ended()
        if self._asleep:
            raise EngineAsleep(ASLEEP)

    def _check_not_ended(self) -> None:
        if self._ended is not None:
            raise EngineUnavailable(self._ended)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)


class _Alone:
    """While this is entered nothing runs, and nothing starts."""

    def __init__(self, engine: LmdeployEngine, *, abort: bool) -> None:
        self._engine = engine
        self._abort = abort

    async def __aenter__(self) -> None:
        engine = self._engine
        engine._updates += 1
        try:
            if self._abort:
                await engine._end(list(engine._running))
            await engine._changing.acquire()
            try:
                while engine._running:
                    await asyncio.wait(engine._running.values())
                if engine._started and engine._sleep_level is None:
                    await engine._backend.settle()
            except BaseException:
                engine._changing.release()
                raise
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._engine._changing.release()
        self._leave()

    def _leave(self) -> None:
        self._engine._updates -= 1
        self._engine._fill()


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Wait for work that must not be left half-done; a cancellation is raised afterwards."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _ending(status: ResponseType) -> tuple[FinishReason, str | None]:
    """Say in our words how LMDeploy ended a request that had no end of its own."""
    if status is ResponseType.FINISH:
        return "length", None
    if status is ResponseType.CANCEL:
        return "abort", None
    if status is ResponseType.ENGINE_STOP_ERROR:
        return "error", "LMDeploy's engine is dead"
    return "error", f"LMDeploy ended the request with {status.name}"
