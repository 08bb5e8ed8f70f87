"""Who runs on LMDeploy's engine and who waits for it. All of it happens on the engine's loop.

The queue is ours: what waits in LMDeploy's would start under whatever weights come next, and
could not be told apart from what runs. A slot is free before its rollout's record is made.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from lmdeploy.messages import ResponseType

from serve_app.engines.base import ModelInfo
from serve_app.engines.lmdeploy.backend import Backend
from serve_app.engines.lmdeploy.rollout import Rollout
from serve_app.engines.lmdeploy.sampling import generation_config
from serve_app.errors import EngineOverloaded, InvalidRequest, R3Error
from serve_app.records import Record
from serve_app.types import FinishReason

logger = logging.getLogger(__name__)

TakeArray = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How many rollouts run at once, and how many wait."""

    running: int
    waiting: int


class Slots:
    """Runs rollouts, first come first served, while nothing keeps it closed.

    ``info=None`` records nothing. ``take_array`` turns what LMDeploy gave into an array;
    ``threads`` make records, which takes milliseconds.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        info: ModelInfo | None,
        take_array: TakeArray,
        threads: Executor,
    ) -> None:
        self.weight_version = 0
        self.recomputed = 0
        self._backend = backend
        self._limits = limits
        self._info = info
        self._take_array = take_array
        self._threads = threads
        self._closed = 0
        self._live: dict[str, Rollout] = {}
        self._queue: deque[Rollout] = deque()
        self._running: dict[Rollout, asyncio.Task[None]] = {}

    @property
    def busy(self) -> bool:
        """Whether anything runs."""
        return bool(self._running)

    def records(self, rollout: Rollout) -> bool:
        """Whether a rollout's experts are kept."""
        return self._info is not None and rollout.request.return_routed_experts

    def close(self) -> None:
        """Start nothing until `open` was called as often; what runs runs on."""
        self._closed += 1

    def open(self) -> None:
        """Start what waits, unless somebody else keeps it closed."""
        self._closed -= 1
        self._fill()

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts of one prompt, all or none.

        Raises `EngineOverloaded` when slots and queue are full, `InvalidRequest` for an id in use.
        """
        ids = {rollout.request.request_id for rollout in rollouts}
        if used := self._live.keys() & ids:
            raise InvalidRequest(f"request id {min(used)!r} is already in use")
        limits = self._limits
        if len(self._live) + len(ids) > limits.running + limits.waiting:
            raise EngineOverloaded(
                f"at most {limits.running} requests run and {limits.waiting} wait;"
                f" there are {len(self._live)}, and {len(ids)} came"
            )
        for rollout in rollouts:
            self._live[rollout.request.request_id] = rollout
        self._queue.extend(rollouts)
        self._fill()

    async def abort(self, request_id: str | None) -> int:
        """End one request or group, or all; return how many rollouts that ended."""
        return await self.end(
            [
                rollout
                for rollout in self._live.values()
                if request_id is None or request_id in (rollout.request.request_id, rollout.group)
            ]
        )

    async def abort_running(self) -> None:
        """End what runs; what waits goes on waiting."""
        await self.end(list(self._running))

    async def end(self, rollouts: Collection[Rollout]) -> int:
        """End rollouts and wait until their slots are free; return how many that ended."""
        ended = [rollout for rollout in rollouts if rollout.ending is None]
        await asyncio.gather(*(self._cancel(rollout) for rollout in ended))
        await asyncio.gather(*(rollout.done.wait() for rollout in ended))
        return len(ended)

    async def drain(self) -> None:
        """Wait until nothing runs and the engine has come to rest."""
        while self._running:
            await asyncio.wait(self._running.values())
        await self._backend.settle()

    def fail(self, why: str) -> None:
        """End what waits and what runs, since no step will follow."""
        self.close()
        for running in self._running.values():
            running.cancel()
        for rollout in [*self._running, *self._queue]:
            rollout.end("error", why)
            self._leave(rollout, None)
        self._queue.clear()

    def _fill(self) -> None:
        while not self._closed and self._queue and len(self._running) < self._limits.running:
            rollout = self._queue.popleft()
            # In nobody's context: it begins in the call of another rollout as well, and Ray cancels
            # what a cancelled call has called. LMDeploy may put the rows, and they are fetched.
            driving = asyncio.create_task(self._drive(rollout), context=Context())
            self._running[rollout] = driving

    async def _drive(self, rollout: Rollout) -> None:
        rows = None
        rollout.weight_version = self.weight_version
        try:
            rows = await self._run(rollout)
        except Exception as failure:  # noqa: BLE001  (whatever LMDeploy raises is its reader's)
            rollout.end("error", f"LMDeploy failed: {type(failure).__name__}: {failure}")
        finally:
            del self._running[rollout]
            self._fill()
        if not rollout.done.is_set():
            await self._finish(rollout, rows)

    async def _run(self, rollout: Rollout) -> Any:
        if rollout.leader is not None:
            await _first_of(rollout.leader.begun, rollout.aborted)
        if rollout.aborted.is_set():
            rollout.end("abort")
            return None
        config = generation_config(
            rollout.request,
            stop_ids=rollout.stop_ids,
            max_new_tokens=rollout.max_new_tokens,
            routes=self.records(rollout),
            padding=self._backend.padding,
        )
        session = rollout.session_id = self._backend.open_session()
        rows, cancelled = None, False
        outputs = self._backend.run(session, rollout.request.input_ids, config)
        async with aclosing(outputs):
            async for out in outputs:
                rollout.take(out.token_ids, out.logprobs)
                rows = out.rows
                if out.status is not ResponseType.SUCCESS:
                    rollout.end(*_ending(out.status))
                elif rollout.ending is not None and not cancelled:
                    cancelled = True  # its rows come with the last output
                    await self._backend.cancel(session)
        if self._backend.recomputed(session):
            self._note_recomputed()
        return rows

    def _note_recomputed(self) -> None:
        """Count a rollout that lost its blocks, and say so at 1, 2, 4, 8, ... of them."""
        self.recomputed += 1
        if self.recomputed & (self.recomputed - 1) == 0:
            logger.warning(
                "rollouts that ran out of cache blocks and were processed again: %d. Their records"
                " are exact, their time was lost: fewer at once, or more memory for the cache",
                self.recomputed,
            )

    async def _finish(self, rollout: Rollout, rows: Any) -> None:
        """Make the record, which copies and checks all rows, and send the last chunk."""
        record: Record | None = None
        try:
            if rows is not None and self._info is not None and self.records(rollout):
                array = await self._take_array(rows)
                work = asyncio.get_running_loop().run_in_executor
                record = await work(self._threads, rollout.record, array, self._info)
        except R3Error as error:
            rollout.fail(f"the routed experts that LMDeploy gave cannot be kept: {error}")
        finally:
            self._leave(rollout, record)

    def _leave(self, rollout: Rollout, record: Record | None) -> None:
        del self._live[rollout.request.request_id]
        rollout.close(record)

    async def _cancel(self, rollout: Rollout) -> None:
        rollout.aborted.set()
        if rollout in self._running:
            if rollout.session_id is not None:
                await self._backend.cancel(rollout.session_id)
        elif rollout in self._queue:
            self._queue.remove(rollout)
            rollout.end("abort")
            await self._finish(rollout, None)


async def _first_of(*events: asyncio.Event) -> None:
    """Wait for any of some events."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def _ending(status: ResponseType) -> tuple[FinishReason, str | None]:
    """Say in our words how LMDeploy ended a request that had no end of its own."""
    if status is ResponseType.FINISH:
        return "length", None
    if status is ResponseType.CANCEL:
        return "abort", None
    if status is ResponseType.ENGINE_STOP_ERROR:
        return "error", "LMDeploy's engine is dead"
    return "error", f"LMDeploy ended the request with {status.name}"
