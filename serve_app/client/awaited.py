"""The awaited client: generation uses no thread, store calls use one each."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from serve_app.client.blocking import RoutedExpertsClient
from serve_app.client.rollouts import RolloutCalls
from serve_app.client.served import Handles, ServedGraph
from serve_app.records import Record
from serve_app.store.snapshot import Progress, SnapshotReport
from serve_app.types import (
    ExpertBatch,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    RoutedSequence,
    SleepLevel,
    StoreStats,
    UpdateMode,
    WeightsResult,
)
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.registry import Payload

if TYPE_CHECKING:
    from serve_app.client.blocking import State


class AsyncRoutedExpertsClient:
    """`RoutedExpertsClient`, awaited: generation uses no thread, store calls one each."""

    def __init__(
        self,
        app: str,
        *,
        timeout_s: float = 60.0,
        generate_timeout_s: float = 600.0,
        handles: Handles | None = None,
    ) -> None:
        self._sync = RoutedExpertsClient(
            app, timeout_s=timeout_s, generate_timeout_s=generate_timeout_s, handles=handles
        )
        self._rollouts = RolloutCalls(ServedGraph(app, handles, timeout_s), generate_timeout_s)

    async def generate(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerateResult:
        """See `RoutedExpertsClient.generate`."""
        return await self._rollouts.generate_async(request, timeout_s)

    async def generate_batch(
        self, requests: Sequence[GenerateRequest], *, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """See `RoutedExpertsClient.generate_batch`."""
        return await self._rollouts.generate_batch_async(requests, timeout_s)

    async def generate_group(
        self, request: GenerateRequest, n: int, *, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """See `RoutedExpertsClient.generate_group`."""
        return await self._rollouts.generate_group_async(request, n, timeout_s)

    async def stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerateChunk, None]:
        """See `RoutedExpertsClient.stream`."""
        async with aclosing(self._rollouts.stream_async(request, timeout_s)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abort(self, request_id: str | None = None, *, all: bool = False) -> int:
        """See `RoutedExpertsClient.abort`."""
        return await asyncio.to_thread(self._sync.abort, request_id, all=all)

    async def update_weights(
        self, state: "State", *, version: int, mode: UpdateMode = "abort"
    ) -> list[WeightsResult]:
        """See `RoutedExpertsClient.update_weights`."""
        return await asyncio.to_thread(self._sync.update_weights, state, version=version, mode=mode)

    async def sleep(self, level: SleepLevel = 1) -> None:
        """See `RoutedExpertsClient.sleep`."""
        await asyncio.to_thread(self._sync.sleep, level)

    async def wake(self) -> None:
        """See `RoutedExpertsClient.wake`."""
        await asyncio.to_thread(self._sync.wake)

    async def put(self, ids: npt.ArrayLike, **how: Any) -> str:
        """See `RoutedExpertsClient.put`."""
        return await asyncio.to_thread(self._sync.put, ids, **how)

    async def get(self, key: str) -> Record:
        """See `RoutedExpertsClient.get`."""
        return await asyncio.to_thread(self._sync.get, key)

    async def decode(
        self, payload: Payload, expected: Expected, *, allow_pickle: bool = False
    ) -> Record:
        """See `RoutedExpertsClient.decode`."""
        return await asyncio.to_thread(
            self._sync.decode, payload, expected, allow_pickle=allow_pickle
        )

    async def materialize(self, sequences: Sequence[RoutedSequence], **how: Any) -> ExpertBatch:
        """See `RoutedExpertsClient.materialize`."""
        return await asyncio.to_thread(self._sync.materialize, sequences, **how)

    async def prefetch(
        self, sequences: Sequence[RoutedSequence], **how: Any
    ) -> "asyncio.Task[ExpertBatch]":
        """Start `materialize` in the background; await the task for its batch."""
        return asyncio.create_task(self.materialize(sequences, **how))

    async def micro_batches(
        self, groups: Iterable[Sequence[RoutedSequence]], **how: Any
    ) -> AsyncIterator[ExpertBatch]:
        """See `RoutedExpertsClient.micro_batches`."""
        coming: asyncio.Task[ExpertBatch] | None = None
        try:
            for group in groups:
                last, coming = coming, await self.prefetch(group, **how)
                if last is not None:
                    yield await last
            if coming is not None:
                yield await coming
        finally:
            if coming is not None:
                coming.cancel()

    async def tag(self, keys: Sequence[str], tag: str) -> int:
        """See `RoutedExpertsClient.tag`."""
        return await asyncio.to_thread(self._sync.tag, keys, tag)

    async def renew(
        self, keys: Sequence[str] = (), *, tag: str | None = None, lease_s: float
    ) -> int:
        """See `RoutedExpertsClient.renew`."""
        return await asyncio.to_thread(self._sync.renew, keys, tag=tag, lease_s=lease_s)

    async def release(
        self,
        keys: Sequence[str] = (),
        *,
        tag: str | None = None,
        weight_version_below: int | None = None,
    ) -> int:
        """See `RoutedExpertsClient.release`."""
        return await asyncio.to_thread(
            self._sync.release, keys, tag=tag, weight_version_below=weight_version_below
        )

    async def stats(self) -> StoreStats:
        """See `RoutedExpertsClient.stats`."""
        return await asyncio.to_thread(self._sync.stats)

    async def snapshot(
        self, path: str | Path, *, tag: str | None = None, progress: Progress | None = None
    ) -> SnapshotReport:
        """See `RoutedExpertsClient.snapshot`."""
        return await asyncio.to_thread(self._sync.snapshot, path, tag=tag, progress=progress)

    async def restore(
        self, path: str | Path, *, progress: Progress | None = None
    ) -> SnapshotReport:
        """See `RoutedExpertsClient.restore`."""
        return await asyncio.to_thread(self._sync.restore, path, progress=progress)
