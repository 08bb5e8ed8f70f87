"""Calls to many shards at once, and what a dead or silent one means for a key.

- Its process or node is gone: `RoutesLost`, unless the key was never real.
- It does not answer in time, or its node may still be alive: `StoreUnavailable`, retryable.
"""

import time
from collections.abc import Callable, Mapping
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

from serve_app.errors import R3Error, RoutesLost, StoreUnavailable
from serve_app.store.base import Unreadable
from serve_app.store.directory import find_directory, find_shard
from serve_app.store.keys import parse
from serve_app.store.outbox import Batch

Actor = ActorHandle[Any]
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
    ) -> dict[str, Any]:
        """Call each shard once, all at the same time; an error is that shard's answer.

        A shard that just died restarts within a second, so what failed is asked once more.
        """
        deadline = time.monotonic() + self._timeout_s
        replies: dict[str, Any] = {}
        for _ in range(2):
            calls = {
                shard: call(handle, texts)
                for shard, texts in groups.items()
                if isinstance(replies.get(shard, RayError()), RayError)
                and (handle := self._handle(shard)) is not None
            }
            if not calls:
                break
            ready, _ = ray.wait(
                list(calls.values()),
                num_returns=len(calls),
                timeout=max(0.0, deadline - time.monotonic()),
            )
            arrived = set(ready)
            for shard, ref in calls.items():
                try:
                    if ref not in arrived:
                        raise GetTimeoutError("no answer in time")
                    replies[shard] = ray.get(ref)
                except RayTaskError as error:
                    raise translate(error, shard) from None
                except RayError as error:
                    self._handles.pop(shard, None)
                    replies[shard] = error
        gone = ActorUnschedulableError("no actor of that name")
        return {shard: replies.get(shard, gone) for shard in groups}

    def _handle(self, shard: str) -> Actor | None:
        if shard not in self._handles:
            if (found := find_shard(self._app, shard)) is None:
                return None
            self._handles[shard] = found
        return self._handles[shard]

    def explain(self, keys: list[str], error: RayError) -> dict[str, Unreadable]:
        """Say what a shard that did not answer means for its keys."""
        if not isinstance(error, GONE):
            shard = parse(keys[0], self._app).shard
            unavailable = StoreUnavailable(f"shard {shard} does not answer: {line(error)}")
            return dict.fromkeys(keys, unavailable)
        directory = find_directory(self._app)
        reasons: list[Unreadable] = ray.get(directory.explain.remote(keys), timeout=self._timeout_s)
        return dict(zip(keys, reasons, strict=True))


def get_all(refs: "list[ray.ObjectRef[Batch]]", timeout_s: float) -> list[Batch | Unreadable]:
    """Bring all objects here at once. Waiting first keeps other threads' gets fast."""
    if not refs:
        return []
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=True)
    if len(ready) == len(refs):
        try:
            return list(ray.get(refs))
        except RayError:
            pass  # one of them is lost: find out which
    arrived = set(ready)
    late = StoreUnavailable(f"bytes did not arrive within {timeout_s} s")
    return [_get_one(ref) if ref in arrived else late for ref in refs]


def _get_one(ref: "ray.ObjectRef[Batch]") -> Batch | Unreadable:
    try:
        return ray.get(ref, timeout=1)
    except ObjectLostError:
        return RoutesLost("the node that held the bytes is gone")
    except RayError as error:
        return StoreUnavailable(f"bytes did not arrive: {line(error)}")


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
