"""Who runs next: the waiting queue, the running rows and pending weight updates.

No threads here; `StepThread` calls everything from one.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from serve_app.engines.base import EngineChunk
from serve_app.engines.rollout import Rollout
from serve_app.engines.runner import ModelRunner
from serve_app.engines.sampling import sample
from serve_app.errors import EngineUnavailable
from serve_app.types import FinishReason

# Prompt tokens processed between two decode steps, so that a burst of arrivals doesn't stall
# the running rows for long; one prompt at least.
PREFILL_TOKENS_PER_STEP = 1024

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """Checked weights that wait for the batch to be empty. Cancelling ``done`` withdraws it."""

    state: State
    version: int
    done: Future[None]


class Batch:
    """At most ``max_size`` rollouts run at once, in the order they came; the others wait.

    ``running[i]`` is row *i* of the runner. Every chunk goes to ``emit``.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_size: int,
        emit: Callable[[Rollout, EngineChunk], None],
    ) -> None:
        self.weight_version = 0
        self._runner = runner
        self._max_size = max_size
        self._emit = emit
        self._waiting: deque[Rollout] = deque()
        self._running: list[Rollout] = []
        self._updates: deque[WeightUpdate] = deque()

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._waiting or self._running or self._updates)

    def add(self, rollout: Rollout) -> None:
        """Let a rollout wait for its turn."""
        self._waiting.append(rollout)

    def update(self, update: WeightUpdate) -> None:
        """Load weights when nothing runs any more; what waits is served by the new ones."""
        self._updates.append(update)

    def abort(self, chosen: Callable[[Rollout], bool]) -> int:
        """End the chosen rollouts, running or waiting, now; return how many."""
        ended = self.abort_running(chosen)
        for rollout in [rollout for rollout in self._waiting if chosen(rollout)]:
            self._waiting.remove(rollout)
            self._end(rollout, "abort")
            ended += 1
        return ended

    def abort_running(self, chosen: Callable[[Rollout], bool]) -> int:
        """End the chosen rollouts that run."""
        rows = [row for row, rollout in enumerate(self._running) if chosen(rollout)]
        for row in reversed(rows):
            self._end(self._leave(row), "abort")
        return len(rows)

    def fail(self, reason: FinishReason, error: str | None, cause: Exception) -> None:
        """End everything without touching the model."""
        for rollout in (*self._running, *self._waiting):
            self._end(rollout, reason, error)
        self._running.clear()
        self._waiting.clear()
        while self._updates:
            update = self._updates.popleft()
            if update.done.set_running_or_notify_cancel():
                update.done.set_exception(cause)

    def step(self) -> None:
        """Load weights if it is time, let waiting rollouts in, sample a token for each row."""
        if self._updates and not self._running:
            self._apply(self._updates.popleft())
            return
        if not self._updates:
            self._admit()
        if self._running:
            self._decode()

    def _apply(self, update: WeightUpdate) -> None:
        if not update.done.set_running_or_notify_cancel():
            return
        try:
            self._runner.load(update.state)
        except Exception as failure:
            # Some weights may be new and others old: nothing sampled from now on could be trusted.
            broken = EngineUnavailable(
                f"loading weights version {update.version} failed half-way: {failure}"
            )
            update.done.set_exception(broken)
            raise broken from failure
        self.weight_version = update.version
        update.done.set_result(None)

    def _admit(self) -> None:
        budget = PREFILL_TOKENS_PER_STEP
        while self._waiting and len(self._running) < self._max_size and budget > 0:
            budget -= len(self._waiting[0].prompt)
            # Still first in the queue while it is processed: if that fails, `fail` finds it.
            self._prefill(self._waiting[0])
            self._waiting.popleft()

    def _prefill(self, rollout: Rollout) -> None:
        prefilled = self._runner.prefill(rollout.prompt, record=rollout.experts is not None)
        rollout.weight_version = self.weight_version
        if rollout.experts is not None:
            assert prefilled.experts is not None
            rollout.experts.append(prefilled.experts)
        [token], [logprob] = sample(prefilled.logits, [rollout.sampler])
        if not self._take(rollout, token, logprob):
            self._runner.join(prefilled)
            self._running.append(rollout)

    def _decode(self) -> None:
        record = any(rollout.experts is not None for rollout in self._running)
        logits, experts = self._runner.decode(
            [rollout.output[-1] for rollout in self._running], record=record
        )
        tokens, logprobs = sample(logits, [rollout.sampler for rollout in self._running])
        # Backwards, because the last row moves into the place of one that leaves.
        for row in reversed(range(len(self._running))):
            rollout = self._running[row]
            if rollout.experts is not None:
                assert experts is not None
                rollout.experts.append(experts[row : row + 1])
            if self._take(rollout, tokens[row], logprobs[row]):
                self._leave(row)

    def _take(self, rollout: Rollout, token: int, logprob: float) -> bool:
        """Give a rollout its next token; return whether it ended."""
        chunk = rollout.take(token, logprob)
        self._emit(rollout, chunk)
        return chunk.finish_reason is not None

    def _leave(self, row: int) -> Rollout:
        rollout = self._running[row]
        self._runner.leave(row)
        last = self._running.pop()
        if last is not rollout:
            self._running[row] = last
        return rollout

    def _end(self, rollout: Rollout, reason: FinishReason, error: str | None = None) -> None:
        if not rollout.output:
            rollout.weight_version = self.weight_version
        self._emit(rollout, rollout.end(reason, error))
