"""Calls to many shards at once, and what a dead or silent one means for a key.

- Its process or node is gone: `RoutesLost`, unless the key was never real.
- It does not answer in time, or its node may still be alive: `StoreUnavailable`, retryable.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    RayError,
    RayTaskError,
)

from serve_app.errors import R3Error, StoreUnavailable, without_frames
from serve_app.store.base import Meanwhile, Unreadable
from serve_app.store.keys import parse
from serve_app.store.owner.directory import find_directory, find_shard

Actor = ActorHandle[Any]
GIVE_UP_AFTER_S = 2.0
"""How long a shard that Ray calls dead or unreachable is asked again."""
GONE = (ActorDiedError, ActorUnschedulableError, ObjectLostError)


class ShardCalls:
    """Finds an application's shards by name and asks them, each once, all at the same time."""

    def __init__(self, app: str, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._handles: dict[str, Actor] = {}

    def ask(
        self,
        groups: Mapping[str, list[str]],
        call: "Callable[[Actor, list[str]], ray.ObjectRef[Any]]",
        meanwhile: Meanwhile | None = None,
    ) -> dict[str, Any]:
        """Call each shard once, all at the same time; an error is that shard's answer.

        ``meanwhile`` is run while they work.

        A call to a process that has just died fails only after a second or two, but its
        successor answers within one. So an idempotent call is sent again while it waits, and
        whatever answers first counts. A node that Ray finds unreachable ends the wait early.
        """
        begun = time.monotonic()
        replies: dict[str, Any] = {}
        sent: dict[ray.ObjectRef[Any], str] = {}
        open_shards = list(groups)
        for pause_s in _pauses():
            asked: list[str] = []
            for shard in open_shards:
                if (handle := self._handle(shard)) is None:
                    replies[shard] = ActorUnschedulableError("no actor of that name")
                else:
                    sent[call(handle, groups[shard])] = shard
                    asked.append(shard)
            if meanwhile is not None:
                meanwhile()
                meanwhile, begun = None, time.monotonic()
            self._receive(sent, asked, replies, min(pause_s, self._left(begun)))
            open_shards = [
                shard
                for shard in open_shards
                if self._is_open(replies.get(shard), time.monotonic() - begun)
            ]
            if not open_shards or not self._left(begun):
                break
        late = GetTimeoutError(f"no answer within {self._timeout_s} s")
        return {shard: replies.get(shard, late) for shard in groups}

    def _left(self, begun: float) -> float:
        return max(0.0, begun + self._timeout_s - time.monotonic())

    def _receive(
        self,
        sent: "dict[ray.ObjectRef[Any], str]",
        open_shards: list[str],
        replies: dict[str, Any],
        timeout_s: float,
    ) -> None:
        """Wait until every open shard has answered, or the time is over; errors may be mended."""
        until, waiting = time.monotonic() + timeout_s, set(open_shards)
        while waiting and (left := until - time.monotonic()) > 0:
            if not sent:
                time.sleep(left)
                return
            only = next(iter(sent)) if len(sent) == 1 else None  # to wait for it is to get it
            ready = [only] if only else ray.wait(list(sent), num_returns=1, timeout=left)[0]
            for ref in ready:
                shard = sent.pop(ref)
                try:
                    replies[shard] = ray.get(ref, timeout=left)
                    waiting.discard(shard)
                except GetTimeoutError:
                    sent[ref] = shard
                except RayTaskError as error:
                    raise translate(error, shard) from None
                except RayError as error:
                    self._handles.pop(shard, None)
                    if isinstance(replies.get(shard, error), RayError):
                        replies[shard] = without_frames(error)

    def _is_open(self, reply: Any, waited_s: float) -> bool:
        """Whether a shard's answer may still come."""
        if reply is None:
            return True
        if isinstance(reply, ActorUnschedulableError):
            return False
        return isinstance(reply, RayError) and waited_s < GIVE_UP_AFTER_S

    def _handle(self, shard: str) -> Actor | None:
        # Another thread may forget the handle at any moment.
        if (known := self._handles.get(shard)) is not None:
            return known
        if (found := find_shard(self._app, shard)) is not None:
            self._handles[shard] = found
        return found

    def explain(self, keys: list[str], error: RayError) -> dict[str, Unreadable]:
        """Say what a shard that did not answer means for its keys."""
        if not isinstance(error, GONE):
            shard = parse(keys[0], self._app).shard
            unavailable = StoreUnavailable(f"shard {shard} does not answer: {line(error)}")
            return dict.fromkeys(keys, unavailable)
        try:
            reasons: list[Unreadable] = self._directory(lambda actor: actor.explain.remote(keys))
        except StoreUnavailable as error_there:
            return dict.fromkeys(keys, without_frames(error_there))
        return dict(zip(keys, reasons, strict=True))

    def moved(self, epochs: list[int]) -> dict[int, str]:
        """Return which shards took over records that were restored from these epochs."""
        found: dict[int, str] = self._directory(lambda actor: actor.moved.remote(epochs))
        return found

    def _directory(self, call: "Callable[[Actor], ray.ObjectRef[Any]]") -> Any:
        try:
            return ray.get(call(find_directory(self._app)), timeout=self._timeout_s)
        except RayError as error:
            raise translate(error, "directory") from None


def translate(error: RayError, shard: str) -> R3Error:
    """Return the typed error of a failed call; raise it unchanged if it is none of ours."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, R3Error):
        return error.cause
    if isinstance(error, (ActorUnavailableError, GetTimeoutError, *GONE)):
        return StoreUnavailable(f"shard {shard} does not answer: {line(error)}")
    raise error


def line(error: BaseException) -> str:
    """Return the first line of an error that Ray made many lines long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pauses() -> Iterator[float]:
    """How long to wait before asking again: briefly at first, then doubling."""
    yield from (0.25, 0.25, 0.25, 0.25)
    pause_s = 0.5
    while True:
        yield pause_s
        pause_s *= 2
