"""The thread that owns the model and the batch.

Other threads only post commands, which run between two steps; chunks go back through the
event loops of their readers. Nothing is shared but the mailbox and the live request ids, and a
command whose future is done has taken effect.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from serve_app.engines.base import EngineChunk
from serve_app.engines.stream import Outbox
from serve_app.engines.transformers.batch import Batch, State, WeightUpdate
from serve_app.engines.transformers.rollout import Rollout
from serve_app.engines.transformers.runner import ModelRunner
from serve_app.errors import EngineAsleep, EngineOverloaded, EngineUnavailable, InvalidRequest
from serve_app.types import UpdateMode

logger = logging.getLogger(__name__)

Command = Callable[[], object]
T = TypeVar("T")

STOPPED = "the engine was stopped"
ASLEEP = "the engine sleeps: call wake() first"


class StepThread:
    """Runs rollouts through a runner until it is stopped or a step fails."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_batch_size: int,
        max_waiting: int,
        num_threads: int,
    ) -> None:
        self.ended: str | None = None
        self.asleep = False
        self.finished: Future[None] = Future()
        self.finished.set_running_or_notify_cancel()  # one waiter's cancellation is not all's
        self._runner = runner
        self._max_running = max_batch_size
        self._max_waiting = max_waiting
        self._num_threads = num_threads
        self._outbox = Outbox()
        self._batch = Batch(runner, max_size=max_batch_size, emit=self._emit)
        self._lock = threading.Lock()
        self._live: set[str] = set()
        self._mailbox: SimpleQueue[Command] = SimpleQueue()
        self._stopping = False
        self._working_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="r3serve-steps", daemon=True)
        self._thread.start()

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses."""
        return self._batch.weight_version

    @property
    def stuck_s(self) -> float:
        """Seconds since the last sign of progress; 0 while there is nothing to do."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Queue rollouts of one prompt, all or none.

        Raises `EngineOverloaded` when batch and queue are full, `InvalidRequest` for an id
        still in use, `EngineAsleep`, or `EngineUnavailable` when the thread has ended.
        """
        ids = {rollout.request_id for rollout in rollouts}
        with self._lock:
            self._check_serving()
            if used := self._live & ids:
                raise InvalidRequest(f"request id {min(used)!r} is already in use")
            if len(self._live) + len(ids) > self._max_running + self._max_waiting:
                raise EngineOverloaded(
                    f"at most {self._max_running} requests run and {self._max_waiting} wait;"
                    f" there are {len(self._live)}, and {len(ids)} came"
                )
            self._live |= ids
            self._mailbox.put(lambda: self._batch.add(rollouts))

    def abort(self, request_id: str | None) -> Future[int]:
        """End one request or group, or all; the future has how many, when their slots are free."""
        done: Future[int] = Future()

        def run() -> None:
            ended = self._batch.abort(
                lambda r: request_id is None or request_id in (r.request_id, r.group)
            )
            self._outbox.flush()
            _answer(done, ended)

        return self._post(run, done)

    def abandon(self, rollout: Rollout) -> None:
        """End a rollout whose reader is gone. Not waited for, and fine when it has ended."""
        with self._lock:
            if self.ended is None:
                self._mailbox.put(lambda: self._batch.abort(lambda r: r is rollout))

    def update(self, state: State, version: int, mode: UpdateMode) -> Future[None]:
        """Load checked weights once nothing runs; ``abort`` sees to that at once."""
        update = WeightUpdate(state, version, Future())
        if self.asleep:
            raise EngineAsleep(ASLEEP)

        def run() -> None:
            self._batch.update(update)
            if mode == "abort":
                self._batch.abort_running(lambda _: True)

        return self._post(run, update.done)

    def sleep(self, *, keep: bool) -> Future[None]:
        """Refuse requests from now on, end those there are, take the weights out of the model."""
        done: Future[None] = Future()

        def run() -> None:
            self.asleep = True  # again: a wake that was still under way may have ended
            self._batch.sleep(keep=keep)
            self._outbox.flush()
            _answer(done, None)

        with self._lock:
            self._check_not_ended()
            self.asleep = True
            self._mailbox.put(run)
        return done

    def wake(self, state: State | None, version: int) -> Future[None]:
        """Put the weights back, or checked other ones, and take requests again."""
        done: Future[None] = Future()

        def run() -> None:
            self._batch.wake(state, version)
            self.asleep = False
            _answer(done, None)

        return self._post(run, done)

    def stop(self) -> None:
        """Ask the thread to end; ``finished`` tells when it is about to."""
        with self._lock:
            if self.ended is None:
                self._mailbox.put(self._begin_stop)

    def join(self) -> None:
        """Wait for the thread to be gone."""
        self._thread.join()

    def _post(self, command: Command, done: Future[T]) -> Future[T]:
        with self._lock:
            self._check_not_ended()
            self._mailbox.put(command)
        return done

    def _check_serving(self) -> None:
        self._check_not_ended()
        if self.asleep:
            raise EngineAsleep(ASLEEP)

    def _check_not_ended(self) -> None:
        if self.ended is not None:
            raise EngineUnavailable(self.ended)

    # Everything below runs in the thread.

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            try:
                self._run_steps()
            except Exception as failure:
                logger.exception("the engine's step loop failed")
                self._close(f"the engine's step loop failed: {type(failure).__name__}: {failure}")
            else:
                self._close(STOPPED)
            self._runner.close()
        finally:
            self.finished.set_result(None)

    def _run_steps(self) -> None:
        while True:
            self._run_commands(wait=self._batch.idle)
            if self._stopping:
                return
            self._working_since = time.monotonic()
            self._batch.step()
            self._flush()

    def _run_commands(self, *, wait: bool) -> None:
        if wait:
            self._working_since = None
            command = self._mailbox.get()
            self._working_since = time.monotonic()
            command()
        while True:
            try:
                command = self._mailbox.get_nowait()
            except Empty:
                return
            command()

    def _begin_stop(self) -> None:
        self._stopping = True

    def _close(self, why: str) -> None:
        """End what is left, and what was posted until nobody could post any more."""
        with self._lock:
            self.ended = why
        self._fail_all(why)
        self._run_commands(wait=False)
        self._fail_all(why)

    def _fail_all(self, why: str) -> None:
        if self._stopping:
            self._batch.fail("abort", None, EngineUnavailable(why))
        else:
            self._batch.fail("error", why, EngineUnavailable(why))
        self._outbox.flush()

    def _emit(self, rollout: Rollout, chunk: EngineChunk) -> None:
        if chunk.finish_reason is not None:
            with self._lock:
                self._live.discard(rollout.request_id)
        self._outbox.add(rollout.stream, chunk)

    def _flush(self) -> None:
        if closed := self._outbox.flush():
            self._batch.abort(lambda r: r.stream.loop in closed)


def _answer(done: Future[T], value: T) -> None:
    if done.set_running_or_notify_cancel():
        done.set_result(value)
