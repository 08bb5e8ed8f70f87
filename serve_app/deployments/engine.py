"""The engine deployment: samples rollouts and turns their records into keys."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.context import application, connect_store, replica_id
from serve_app.deployments.store import ExpertStore
from serve_app.engines.base import Engine, EngineChunk, ModelInfo
from serve_app.engines.loading import load_engine
from serve_app.errors import R3Error
from serve_app.records import Record
from serve_app.store.base import RecordStore
from serve_app.types import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    UpdateMode,
    WeightsResult,
)
from serve_app.weights import Published, newest_weights, unpack


class InferenceEngine:
    """One engine replica. Every key it answers with reads on after this process is gone."""

    def __init__(
        self, args: EngineArgs, store_args: StoreArgs, store: DeploymentHandle[ExpertStore]
    ) -> None:
        self._args = args
        self._store_args = store_args
        self._supervisor = store
        self._engine: Engine = load_engine(args)
        self._store: RecordStore | None = None
        self._starting = asyncio.Lock()
        self._started = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end."""
        async with aclosing(self.stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.result is not None:
                    return chunk.result
        raise AssertionError("a stream ends with a result")

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout; the last chunk carries the whole result."""
        await self._start()
        self._engine.check(request)
        output_ids: list[int] = []
        logprobs: list[float] = []
        text: list[str] = []
        async with aclosing(self._engine.generate(request)) as chunks:
            async for chunk in chunks:
                output_ids += chunk.token_ids
                logprobs += chunk.logprobs
                text.append(chunk.text)
                result = None
                if chunk.finish_reason is not None:
                    routes = await self._hand_out(request, chunk)
                    result = GenerateResult(
                        request_id=request.request_id,
                        output_ids=output_ids,
                        logprobs=logprobs,
                        text="".join(text),
                        finish_reason=chunk.finish_reason,
                        prompt_tokens=len(request.input_ids),
                        weight_version=chunk.weight_version,
                        error=chunk.error,
                        **routes,
                    )
                yield GenerateChunk(
                    request.request_id, chunk.token_ids, chunk.logprobs, chunk.text, result
                )

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; return how many were under way here."""
        return await self._engine.abort(request_id)

    async def update_weights(
        self, weights: Published, version: int, mode: UpdateMode
    ) -> WeightsResult:
        """Serve other weights from now on; the old ones stay if these do not fit."""
        await self._start()
        return await self._load(weights, version, mode)

    async def weight_version(self) -> tuple[str, int]:
        """Return this replica's name and the version that it samples with."""
        await self._start()
        return replica_id(), self._engine.weight_version

    async def info(self) -> ModelInfo:
        """Describe the served model."""
        return self._engine.info

    async def check_health(self) -> None:
        """Let Serve replace this replica when its engine is dead."""
        self._engine.check_health()

    async def _start(self) -> None:
        """Bring a replica that started late to the newest weights, before its first answer."""
        if self._started:
            return
        async with self._starting:
            if self._started:
                return
            if ray.is_initialized() and (newest := await newest_weights(application())):
                await self._load(newest.weights, newest.version, "drain")
            self._started = True

    async def _load(self, weights: Published, version: int, mode: UpdateMode) -> WeightsResult:
        begun = time.monotonic()
        state = await asyncio.to_thread(unpack, weights)
        await self._engine.update_weights(state, version, mode)
        return WeightsResult(replica_id(), version, time.monotonic() - begun)

    async def _hand_out(self, request: GenerateRequest, last: EngineChunk) -> dict[str, Any]:
        """Turn the last chunk's record into the answer's key or array, or say why there is none."""
        if not request.return_routed_experts:
            return {}
        if not self._args.enable_return_routed_experts:
            return {
                "routed_experts_error": "enable_return_routed_experts is off in this engine's"
                " configuration, so it records no experts"
            }
        if last.record is None:
            return {"routed_experts_error": _why_none(last.finish_reason)}
        rows = last.record.meta.rows
        if not self._args.enable_transfer_obj_ref:
            return {"routed_experts": last.record.ids, "num_routed_tokens": rows}
        try:
            key = await self._put(request, last.record)
        except R3Error as error:
            return {"routed_experts_error": f"{type(error).__name__}: {error}"}
        return {"routed_experts": key, "num_routed_tokens": rows}

    async def _put(self, request: GenerateRequest, record: Record) -> str:
        if self._store is None:
            self._store = await connect_store(self._store_args, self._supervisor)
        put = asyncio.ensure_future(
            self._store.aput(record, tag=request.tag, lease_s=request.lease_s)
        )
        try:
            return await asyncio.shield(put)
        except asyncio.CancelledError:
            put.add_done_callback(self._release_unread)
            raise

    def _release_unread(self, put: "asyncio.Future[str]") -> None:
        """Free a record whose client went away while it was being put."""
        if not put.cancelled() and put.exception() is None and self._store is not None:
            asyncio.get_running_loop().run_in_executor(None, self._store.release, [put.result()])


def _why_none(finish_reason: FinishReason | None) -> str:
    if finish_reason == "abort":
        return "aborted before any token was processed"
    return f"the engine recorded nothing (finish reason {finish_reason})"
