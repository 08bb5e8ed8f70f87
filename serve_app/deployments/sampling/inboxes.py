"""Weights in parts for an engine group: its workers take them, one of them keeps them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from serve_app.engines.base import Engine
from serve_app.errors import EngineUnavailable, InvalidRequest, R3Error
from serve_app.weights import in_worker
from serve_app.weights.holder import unpack
from serve_app.weights.parts import BroadcastPart, GroupSpec, Inbox, PickledPart, WeightsInbox

if TYPE_CHECKING:
    import torch

_ANSWER_S = 600.0
_SLACK_S = 30.0


def inbox_of(engine: Engine) -> Inbox:
    """Return where an engine's weights in parts are collected."""
    workers = getattr(engine, "workers", None)
    return WorkersInbox(workers) if workers else WeightsInbox()


class WorkersInbox:
    """Collects in the workers of a group, in the order of their ranks; see `Inbox`."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = list(workers)

    @property
    def ranks(self) -> int:
        """How many ranks of a trainer's group this replica is."""
        return len(self._workers)

    def unpickle(self, part: PickledPart) -> int:
        """Let each worker unpickle its own part, the first one alone where there is one for all."""
        if isinstance(part.data, str) or len(part.data) == 1:
            return self._first([(in_worker.unpickle, part, True)])
        if len(part.data) != len(self._workers):
            raise InvalidRequest(
                f"expected one pickled part, or one for each of {len(self._workers)} workers, got"
                f" {len(part.data)}"
            )
        own = [PickledPart(data, part.load_format) for data in part.data]
        return self._first([(in_worker.unpickle, one, n == 0) for n, one in enumerate(own)])

    def join(self, spec: GroupSpec, index: int, timeout_s: float) -> None:
        """Join a group, each worker as one of its ranks."""
        calls = [(in_worker.join, spec, index + n, timeout_s) for n in range(self.ranks)]
        self._each(calls, timeout_s + _SLACK_S)

    def leave(self, name: str) -> None:
        """Leave a group."""
        self._each([(in_worker.leave, name)] * self.ranks)

    def receive(self, part: BroadcastPart) -> int:
        """Let all workers take what rank 0 broadcasts."""
        return self._first([(in_worker.receive, part, n == 0) for n in range(self.ranks)])

    def take(self) -> "dict[str, torch.Tensor]":
        """Return all that came so far, and begin anew."""
        return unpack(self._each([(in_worker.take,)])[0])

    def _first(self, calls: Sequence[tuple[Any, ...]]) -> int:
        return int(self._each(calls)[0])

    def _each(self, calls: Sequence[tuple[Any, ...]], timeout_s: float = _ANSWER_S) -> list[Any]:
        """Call the first workers at once, a call each; beside the steps of the model."""
        workers = zip(self._workers, calls, strict=False)
        try:
            return ray.get(
                [worker.run_aside.remote(*call) for worker, call in workers], timeout=timeout_s
            )
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, R3Error) else error from None
        except RayError as error:
            raise EngineUnavailable(f"a worker did not take part in the update: {error}") from None
