"""One replica's part in an update that comes over HTTP, piece by piece."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import ray

from serve_app.deployments.context import application, replica_id
from serve_app.types import WeightsResult
from serve_app.weights.holder import open_holder, pack
from serve_app.weights.parts import BroadcastPart, GroupSpec, Inbox, PickledPart

if TYPE_CHECKING:
    import torch

    Serve = Callable[[Mapping[str, torch.Tensor], int], Awaitable[WeightsResult]]

HOLDER_TIMEOUT_S = 60.0


class PartialUpdates:
    """Collects parts, then lets the engine serve the whole. Every replica gets the same calls."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._turn = asyncio.Lock()

    async def add(self, part: PickledPart | BroadcastPart) -> int:
        """Take some tensors; return how many."""
        async with self._turn:
            work = self._inbox.unpickle if isinstance(part, PickledPart) else self._inbox.receive
            return await asyncio.to_thread(work, part)  # type: ignore[arg-type]

    async def join(self, spec: GroupSpec, replicas: Sequence[str], timeout_s: float) -> None:
        """Join a trainer's group, as this replica's place among all of them says."""
        async with self._turn:
            first = replicas.index(replica_id()) * self._inbox.ranks
            await asyncio.to_thread(self._inbox.join, spec, first, timeout_s)

    async def leave(self, name: str) -> None:
        """Leave a trainer's group."""
        async with self._turn:
            await asyncio.to_thread(self._inbox.leave, name)

    async def commit(self, version: int, publisher: str, serve: "Serve") -> WeightsResult:
        """Serve what came; one replica keeps it for those that start later."""
        async with self._turn:
            state = await asyncio.to_thread(self._inbox.take)
            result = await serve(state, version)
            if publisher == replica_id() and ray.is_initialized():
                await asyncio.to_thread(_publish, state, version)
            return result


def _publish(state: "Mapping[str, torch.Tensor]", version: int) -> None:
    holder = open_holder(application(), HOLDER_TIMEOUT_S)
    ray.get(holder.stage.remote(pack(state), version), timeout=HOLDER_TIMEOUT_S)
    ray.get(holder.commit.remote(version), timeout=HOLDER_TIMEOUT_S)
