"""A served replica with the methods of its deployment, called from this process."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve

from serve_app.client.rollouts import RolloutCalls
from serve_app.client.served import ENGINE, ServedGraph, engine_error
from serve_app.errors import R3Error
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult, UpdateMode
from serve_app.weights.holder import Packed

TIMEOUT_S = 120.0


class ServedReplica:
    """The engine replicas of an application; where there are several, Serve chooses."""

    def __init__(self, app: str) -> None:
        self._rollouts = RolloutCalls(ServedGraph(app, None, TIMEOUT_S), TIMEOUT_S)
        self._handle: Any = serve.get_deployment_handle(ENGINE, app).options(_by_reference=True)

    def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        return self._rollouts.stream_async(request)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return await self._rollouts.generate_async(request)

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        return await self._rollouts.generate_group_async(request, n)

    async def abort(self, request_id: str | None = None) -> int:
        return int(await self.call("abort", request_id))

    async def update_weights(self, weights: Packed, version: int, mode: UpdateMode) -> None:
        await self.call("update_weights", [ray.put(weights)], version, mode)

    async def call(self, method: str, *args: Any) -> Any:
        """Call any method; its typed error is raised, and a cancellation is passed on."""
        response = getattr(self._handle, method).remote(*args)
        try:
            return await asyncio.wait_for(response, TIMEOUT_S)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # noqa: BLE001  (told apart by `_typed`)
            raise _typed(error) from None

    def now(self, method: str, *args: Any) -> Any:
        """Call any method and block; not for the thread of an event loop."""
        try:
            return getattr(self._handle, method).remote(*args).result(timeout_s=TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  (told apart by `_typed`)
            raise _typed(error) from None


def _typed(error: Exception) -> Exception:
    try:
        return error if isinstance(error, R3Error) else engine_error(error, TIMEOUT_S)
    except Exception as other:  # noqa: BLE001  (it was not of ours)
        return other
