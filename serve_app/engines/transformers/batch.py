"""Who runs next: the waiting queue, the prompt on its way in, the running rows, weight updates.

No threads here; `StepThread` calls everything from one.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from serve_app.engines.base import EngineChunk
from serve_app.engines.transformers.rollout import Rollout
from serve_app.engines.transformers.runner import ModelRunner, Prompt
from serve_app.engines.transformers.sampling import sample
from serve_app.errors import EngineUnavailable
from serve_app.types import FinishReason

# Prompt tokens processed in one pass, and the fewest between two decode steps (less than twice
# as many at most): a long prompt doesn't stall the running rows. Always the same pieces, so that
# what else runs changes nothing in how a prompt is processed.
PIECE = 512

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """Checked weights that wait for the batch to be empty. Cancelling ``done`` withdraws it."""

    state: State
    version: int
    done: Future[None]


@dataclass(frozen=True, slots=True)
class Entering:
    """A prompt being processed, and the rollouts of it that have no row yet."""

    prompt: Prompt
    rollouts: list[Rollout]


class Batch:
    """At most ``max_size`` rollouts run at once, in the order they came; the others wait.

    ``running[i]`` is row *i* of the runner. Rollouts that come together share a prompt, which is
    processed once. Every chunk goes to ``emit``.
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
        self._waiting: deque[list[Rollout]] = deque()
        self._entering: Entering | None = None
        self._running: list[Rollout] = []
        self._updates: deque[WeightUpdate] = deque()

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._waiting or self._entering or self._running or self._updates)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Let rollouts of one prompt wait for their turn."""
        self._waiting.append(list(rollouts))

    def update(self, update: WeightUpdate) -> None:
        """Load weights when nothing runs any more; what waits is served by the new ones."""
        self._updates.append(update)

    def abort(self, chosen: Callable[[Rollout], bool]) -> int:
        """End the chosen rollouts, running or waiting, now; return how many."""
        ended = self.abort_running(chosen)
        for group in self._waiting:
            ended += self._abort_in(group, chosen)
        self._waiting = deque(group for group in self._waiting if group)
        return ended

    def abort_running(self, chosen: Callable[[Rollout], bool]) -> int:
        """End the chosen rollouts that run, or whose prompt is being processed."""
        rows = [row for row, rollout in enumerate(self._running) if chosen(rollout)]
        for row in reversed(rows):
            self._end(self._leave(row), "abort")
        ended = len(rows)
        if self._entering is not None:
            ended += self._abort_in(self._entering.rollouts, chosen)
            if not self._entering.rollouts:
                self._entering = None
        return ended

    def fail(self, reason: FinishReason, error: str | None, cause: Exception) -> None:
        """End everything without touching the model."""
        entering = self._entering.rollouts if self._entering is not None else []
        for group in (self._running, entering, *self._waiting):
            for rollout in group:
                self._end(rollout, reason, error)
        self._running.clear()
        self._entering = None
        self._waiting.clear()
        while self._updates:
            update = self._updates.popleft()
            if update.done.set_running_or_notify_cancel():
                update.done.set_exception(cause)

    def sleep(self, *, keep: bool) -> None:
        """End everything, load what waits to be loaded, take the weights out of the model."""
        self.abort(lambda _: True)
        while self._updates:
            self._apply(self._updates.popleft())
        self._runner.sleep(keep=keep)

    def wake(self, state: State | None, version: int) -> None:
        """Put the weights back; ``version`` is that of ``state``, if there is one."""
        self._runner.wake(state)
        if state is not None:
            self.weight_version = version

    def step(self) -> None:
        """Load weights if it is time, let waiting rollouts in, sample a token for each row."""
        if self._updates and not self._running and self._entering is None:
            self._apply(self._updates.popleft())
            return
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
        processed = 0
        while processed < PIECE:
            if self._entering is None:
                full = len(self._running) >= self._max_size
                if full or self._updates or not self._waiting:
                    return
                rollouts = self._waiting.popleft()
                for rollout in rollouts:
                    rollout.weight_version = self.weight_version
                self._entering = Entering(Prompt(rollouts[0].prompt), rollouts)
            if self._entering.prompt.left:
                processed += self._process(self._entering)
            elif self._place(self._entering):
                self._entering = None
            else:
                return

    def _process(self, entering: Entering) -> int:
        """Process the next piece of a prompt; return its tokens."""
        prompt, before = entering.prompt, entering.prompt.done
        recording = [
            rollout.experts for rollout in entering.rollouts if rollout.experts is not None
        ]
        captured = self._runner.process(prompt, PIECE, record=bool(recording))
        tokens = prompt.done - before
        for experts in recording:
            assert captured is not None
            experts.append(captured, slice(None), tokens)
        return tokens

    def _place(self, entering: Entering) -> bool:
        """Give rollouts of a processed prompt a first token and a row; return whether all got it.

        They stay in ``entering`` until then: if a step fails, `fail` finds them.
        """
        logits = entering.prompt.logits
        assert logits is not None
        while entering.rollouts:
            if len(self._running) >= self._max_size:
                return False
            rollout = entering.rollouts[0]
            [token], [logprob] = sample(logits, [rollout.sampler])
            if not self._take(rollout, token, logprob):
                self._runner.join(entering.prompt)
                self._running.append(rollout)
            entering.rollouts.pop(0)
        return True

    def _decode(self) -> None:
        record = any(rollout.experts is not None for rollout in self._running)
        logits, captured = self._runner.decode(
            [rollout.output[-1] for rollout in self._running], record=record
        )
        tokens, logprobs = sample(logits, [rollout.sampler for rollout in self._running])
        # Backwards, because the last row moves into the place of one that leaves.
        for row in reversed(range(len(self._running))):
            rollout = self._running[row]
            if rollout.experts is not None:
                assert captured is not None
                rollout.experts.append(captured, slice(row, row + 1), 1)
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

    def _abort_in(self, group: list[Rollout], chosen: Callable[[Rollout], bool]) -> int:
        """End and remove the chosen rollouts that have no row."""
        ended = [rollout for rollout in group if chosen(rollout)]
        for rollout in ended:
            group.remove(rollout)
            self._end(rollout, "abort")
        return len(ended)

    def _end(self, rollout: Rollout, reason: FinishReason, error: str | None = None) -> None:
        if not rollout.output and not (rollout.experts and rollout.experts.rows):
            rollout.weight_version = self.weight_version
        self._emit(rollout, rollout.end(reason, error))
