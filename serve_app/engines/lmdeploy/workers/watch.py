"""Are the actors of an engine group alive? Asked from a thread, whatever their event loops do.

NCCL waits for a dead peer for ever, and a stopped process answers nobody: liveness is ours. The
first that is dead, does not answer or says what is wrong ends the watch, and the group with it.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

logger = logging.getLogger(__name__)

LIVENESS = "liveness"
"""The concurrency group that an actor's ``alive`` belongs to: a thread of its own."""

_PERIOD_S = 1.0


class Watch:
    """Asks ``alive`` of actors until one fails; then kills all of them, and tells why once.

    Until `up` is called they may take ``start_s`` for an answer, since imports and models that are
    loaded keep a process from it, then ``answer_s``. Killed: what waits for any of them gets an
    error instead of an answer that never comes.
    """

    def __init__(self, what: str, actors: Sequence[Any], start_s: float, answer_s: float) -> None:
        self.failed: str | None = None
        self._what = what
        self._actors = list(actors)
        self._limits = start_s, answer_s
        self._tell: Callable[[str], None] | None = None
        self._up = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True, name=f"r3serve-{what}")
        self._thread.start()

    def when_failed(self, tell: Callable[[str], None]) -> None:
        """Call ``tell`` with the reason once the watch fails; at once where it has."""
        with self._lock:
            self._tell = tell
            failed = self.failed
        if failed is not None:
            tell(failed)

    def up(self) -> None:
        """Hold the actors to ``answer_s`` from now on: they serve."""
        self._up.set()

    def end(self) -> None:
        """Watch no longer, and kill the actors. Idempotent."""
        self._ended.set()
        self._kill()

    def _watch(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                wrong = self._wrong()
            except Exception as error:  # noqa: BLE001  (a watch that ends unseen is none)
                wrong = f"the {self._what}s cannot be watched: {type(error).__name__}: {error}"
            if self._ended.is_set():
                return
            if wrong is not None:
                self._fail(wrong)
                return
            self._ended.wait(max(_PERIOD_S - (time.monotonic() - began), 0))

    def _wrong(self) -> str | None:
        """Ask all at once; say what is wrong with the first that something is wrong with."""
        asked: dict[Any, int] = {actor.alive.remote(): n for n, actor in enumerate(self._actors)}
        waiting, was_up, asked_at = list(asked), self._up.is_set(), time.monotonic()
        while waiting and not self._ended.is_set():
            if self._up.is_set() and not was_up:
                was_up, asked_at = True, time.monotonic()
            limit_s = self._limits[1] if was_up else self._limits[0]
            left = asked_at + limit_s - time.monotonic()
            if left <= 0:
                late = ", ".join(str(asked[one]) for one in waiting)
                return f"{self._what} {late} gave no sign of life for {limit_s:g} s"
            done, waiting = ray.wait(waiting, timeout=min(left, _PERIOD_S))
            for one in done:
                if wrong := _answer(one):
                    return f"{self._what} {asked[one]}: {wrong}"
        return None

    def _fail(self, why: str) -> None:
        logger.error("an engine group has failed: %s", why)
        with self._lock:
            self.failed = why
            tell = self._tell
        if tell is not None:
            tell(why)
        self._kill()

    def _kill(self) -> None:
        for actor in self._actors:
            try:
                ray.kill(actor)
            except RayError as error:  # Ray itself is going away
                logger.warning("an actor of an engine group was not killed: %s", error)


def _answer(asked: Any) -> str | None:
    try:
        answer: str | None = ray.get(asked, timeout=_PERIOD_S)
    except GetTimeoutError:
        return "its answer was lost"
    except RayError as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return answer
