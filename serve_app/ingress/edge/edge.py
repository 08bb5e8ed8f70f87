"""The ingress deployment: what the routes ask of engines and store."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from serve_app.client.reading import Reader
from serve_app.client.served import Handles, ServedGraph, await_answer
from serve_app.config import EngineArgs, IngressArgs
from serve_app.deployments.context import application, is_local
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.engines.base import ModelInfo
from serve_app.errors import (
    EngineAsleep,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    R3Error,
)
from serve_app.ingress.edge.prompts import Prompts
from serve_app.ingress.guard.gate import Doorkeeper
from serve_app.sessions import is_session
from serve_app.store.base import RecordStore
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult

T = TypeVar("T")
logger = logging.getLogger(__name__)

PATHS = (
    "/health",
    "/generate",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/sleep",
    "/wakeup",
    "/is_sleeping",
    "/abort_request",
    "/terminate",
    "/update_weights",
    "/init_weights_update_group",
    "/update_weights_from_distributed",
    "/destroy_weights_update_group",
    "/routed_experts/fetch",
    "/routed_experts/materialize",
    "/routed_experts/release",
    "/openapi.json",
)
ABORT_TIMEOUT_S = 8.0  # xtuner gives up after 10
HEALTH_TIMEOUT_S = 8.0
INFO_TIMEOUT_S = 30.0


class Ingress:
    """Speaks HTTP for the graph; one a replica, found by the routes."""

    def __init__(
        self,
        args: IngressArgs,
        engine_args: EngineArgs,
        engine: DeploymentHandle[InferenceEngine],
        decoder: DeploymentHandle[ExpertDecoder],
    ) -> None:
        self.args = args
        self.engine_args = engine_args
        self.keeper = Doorkeeper(args, PATHS)
        self.prompts = Prompts(Path(engine_args.model))
        self.prompts.begin_loading()
        self._engine = engine.options(_by_reference=True)
        self._decoder = decoder.options(_by_reference=True)
        handles = Handles(self._engine, self._decoder, application()) if is_local() else None
        self._graph = ServedGraph(application(), handles, args.control_timeout_s)
        self._graph.engine = self._engine
        self._reader = Reader(self._graph)
        # Threads of their own: a control call that waits must keep no prompt from its tokens.
        self._control = ThreadPoolExecutor(8, "r3serve-control")
        self._reads = ThreadPoolExecutor(4, "r3serve-reads")
        self._info: ModelInfo | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which requests may call the model; the first is the one to show."""
        path = self.engine_args.model
        return (self.args.model_name or Path(path).name, path)

    async def info(self) -> ModelInfo:
        """Describe the served model."""
        if self._info is None:
            self._info = await await_answer(self._engine.info.remote(), INFO_TIMEOUT_S)
        return self._info

    async def check_request(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for what no engine replica needs to see."""
        if request.return_routed_experts and not self.engine_args.enable_return_routed_experts:
            raise InvalidRequest(
                "return_routed_experts was asked for, but enable_return_routed_experts is off in"
                " this engine's configuration"
            )
        most = (await self.info()).context_length - 1
        if len(request.input_ids) > most:
            raise InvalidRequest(
                f"expected at most {most} prompt tokens, got {len(request.input_ids)}"
            )

    def calls(self) -> "EngineCalls":
        """Return the engine as one HTTP request uses it."""
        return EngineCalls(self._graph, self.args.request_timeout_s, self._control)

    async def everywhere(self, method: str, *args: Any, within_s: float | None = None) -> list[Any]:
        """Call a method of every engine replica; raise the first error."""

        def call() -> list[Any]:
            return self._graph.broadcast(method, *args, within_s=within_s)

        return await asyncio.get_running_loop().run_in_executor(self._control, call)

    async def is_sleeping(self) -> bool:
        """Tell whether some replica sleeps; raise `EngineUnavailable` where none answers."""

        def call() -> list[Any]:
            return self._graph.broadcast_each("is_sleeping", within_s=HEALTH_TIMEOUT_S)

        answers = await asyncio.get_running_loop().run_in_executor(self._control, call)
        states = [answer for answer in answers if isinstance(answer, bool)]
        if not states:
            raise EngineUnavailable(f"none of {len(answers)} engine replicas answers")
        return any(states)

    async def reading(self, work: Callable[[Reader, RecordStore], T]) -> T:
        """Run blocking work on the application's store."""

        def run() -> T:
            return work(self._reader, self._graph.store)

        return await asyncio.get_running_loop().run_in_executor(self._reads, run)

    async def handles(self) -> Handles:
        """Give a client in Serve's local testing mode what it cannot look up there."""
        return Handles(self._engine, self._decoder, application())


class EngineCalls:
    """One HTTP request's calls; `abandon` undoes them all."""

    def __init__(self, graph: ServedGraph, timeout_s: float, control: ThreadPoolExecutor) -> None:
        self._graph = graph
        self._timeout_s = timeout_s
        self._control = control
        self._begun: dict[str, tuple[GenerateRequest, int]] = {}

    async def result(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout."""
        with self._begin(request, 0):
            result: GenerateResult = await await_answer(
                self._graph.engine.generate.remote(request), self._timeout_s
            )
            return result

    async def group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt, processed once."""
        with self._begin(request, n):
            results: list[GenerateResult] = await await_answer(
                self._graph.engine.generate_group.remote(request, n), self._timeout_s
            )
            return results

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout, chunk by chunk."""
        with self._begin(request, 0):
            async with aclosing(self._graph.astream(request, self._timeout_s)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @contextmanager
    def _begin(self, request: GenerateRequest, members: int) -> Iterator[None]:
        self._begun[request.request_id] = request, members
        try:
            yield
        except (InvalidRequest, EngineOverloaded, EngineAsleep):
            del self._begun[request.request_id]  # the engine took nothing in
            raise

    def abandon(self) -> None:
        """Abort what runs and release what came of it; nothing waits for this.

        A session's id belongs to its client, who may have begun another request under it: there
        only the call itself is cancelled, which has happened by now.
        """
        for request, members in self._begun.values():
            if not is_session(request.request_id):
                self._control.submit(self._undo, request.request_id, members)

    def _undo(self, request_id: str, members: int) -> None:
        try:
            self._graph.broadcast("abandon", request_id, members, within_s=ABORT_TIMEOUT_S)
        except R3Error as error:
            logger.warning("an abandoned request's key is left to its lease: %s", error)


async def gathered(work: Sequence[Any]) -> list[Any]:
    """Await all; when one fails, cancel the others and raise what it raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
