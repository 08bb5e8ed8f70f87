"""A served application as its clients see it: handles by name, answers within a timeout."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError

from serve_app.errors import (
    EngineOverloaded,
    EngineUnavailable,
    R3Error,
    StoreError,
    StoreUnavailable,
    WeightsMismatch,
)
from serve_app.store.access.calls import line
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.base import RecordStore
from serve_app.store.owner.directory import this_cluster
from serve_app.store.owner.memory import shared
from serve_app.types import GenerateChunk, GenerateRequest, UpdateMode, WeightsResult
from serve_app.weights.holder import open_holder, pack

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentBroadcastResponse, DeploymentResponse

ENGINE = "InferenceEngine"
STORE = "ExpertStore"
DECODER = "ExpertDecoder"
INGRESS = "Ingress"

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Handles:
    """Handles of an application that Serve runs in this process (local testing mode)."""

    engine: Any
    decoder: Any
    store_app: str


class ServedGraph:
    """Finds an application's deployments and its store, each when first needed."""

    def __init__(self, app: str, handles: Handles | None, timeout_s: float) -> None:
        self.app = app
        self.timeout_s = timeout_s
        self.handles = handles

    @cached_property
    def engine(self) -> Any:
        """Handle of the engine deployment."""
        return self.handles.engine if self.handles else self._find(ENGINE)

    @cached_property
    def decoder(self) -> Any:
        """Handle of the decoder deployment."""
        return self.handles.decoder if self.handles else self._find(DECODER)

    @cached_property
    def store(self) -> RecordStore:
        """The application's store."""
        if self.handles:
            return shared(self.handles.store_app)
        return connect(self.app, timeout_s=self.timeout_s)

    @property
    def shards(self) -> ShardStore:
        """The application's shards; raises `StoreError` where there are none."""
        if not isinstance(self.store, ShardStore):
            raise StoreError("Serve's local testing mode keeps records in memory, without shards")
        return self.store

    async def engine_async(self) -> Any:
        """Return `engine`; looks it up in a thread, since that call blocks."""
        if "engine" not in self.__dict__:
            return await asyncio.to_thread(lambda: self.engine)
        return self.engine

    def stream(
        self, request: GenerateRequest, timeout_s: float
    ) -> Generator[GenerateChunk, None, None]:
        """Yield one rollout's chunks; Serve's own iterator knows no timeout, so a thread waits."""
        deadline = time.monotonic() + timeout_s
        chunks = self.engine.options(stream=True).stream.remote(request)
        with ThreadPoolExecutor(1, "r3serve-stream") as waiter:
            try:
                while True:
                    chunk = waiter.submit(next, chunks, None).result(deadline - time.monotonic())
                    if chunk is None:
                        return
                    yield chunk
            except _failures() as error:
                raise engine_error(error, timeout_s) from None
            finally:
                chunks.cancel()

    async def astream(
        self, request: GenerateRequest, timeout_s: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Yield one rollout's chunks."""
        engine = await self.engine_async()
        chunks = engine.options(stream=True).stream.remote(request)
        ends, coming = asyncio.get_running_loop().time() + timeout_s, aiter(chunks)
        try:
            while True:
                async with asyncio.timeout_at(ends):  # not while the caller works on a chunk
                    chunk = await anext(coming, None)
                if chunk is None:
                    return
                yield chunk
        except _failures() as error:
            _check_cancelled()
            raise engine_error(error, timeout_s) from None
        finally:
            chunks.cancel()

    def broadcast(self, method: str, *args: Any, within_s: float | None = None) -> list[Any]:
        """Call a method on every engine replica; raise the first error."""
        for answer in (answers := self.broadcast_each(method, *args, within_s=within_s)):
            if isinstance(answer, BaseException):
                raise engine_error(answer, within_s or self.timeout_s)
        return answers

    def broadcast_each(self, method: str, *args: Any, within_s: float | None = None) -> list[Any]:
        """Call a method on every engine replica; return each one's answer or error."""
        from ray.serve.exceptions import DeploymentUnavailableError

        timeout_s = within_s or self.timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            response: DeploymentBroadcastResponse = self.engine.broadcast(method, *args)
            left = max(0.0, deadline - time.monotonic())
            try:
                answers = response.results(timeout_s=left, return_exceptions=True)
            except DeploymentUnavailableError:
                answers = []  # it failed to start so far
            except _failures() as error:
                raise engine_error(error, timeout_s) from None
            # A handle that has just been made may not have heard of any replica yet.
            if answers:
                return list(answers)
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"no engine replica came up within {timeout_s} s")
            time.sleep(_POLL_S)

    def tell_all(self, calls: Sequence[tuple[Any, ...]], within_s: float) -> list[Exception]:
        """Call methods on all engine replicas that there are; return what went wrong."""
        ends, failures = time.monotonic() + within_s, list[Exception]()
        sent: list[DeploymentBroadcastResponse] = [self.engine.broadcast(*call) for call in calls]
        for response in sent:
            try:
                response.results(timeout_s=max(0.0, ends - time.monotonic()))
            except Exception as error:  # noqa: BLE001  (whatever it is, the next is told as well)
                failures.append(error)
        return failures

    def update_weights(self, state: Any, version: int, mode: UpdateMode) -> list[WeightsResult]:
        """Give every engine replica new weights, and keep them for those that start later.

        The holder takes its copy first, replicas load from it, and only then it becomes what a
        starting replica loads; a replica that started in between is brought up to it.
        """
        if self.handles:
            return self._taken(self.broadcast_each("update_weights", pack(state), version, mode))
        holder = open_holder(self.app, self.timeout_s)
        weights = state if isinstance(state, ray.ObjectRef) else ray.put(pack(state))
        held = self._holder_answer(holder.stage.remote(weights, version))
        try:
            results = self._taken(self.broadcast_each("update_weights", held, version, mode))
        except R3Error:
            self._holder_answer(holder.discard.remote(version))
            raise
        self._holder_answer(holder.commit.remote(version))
        behind = {name for name, has in self.broadcast("weight_version") if has != version}
        if behind - {result.replica for result in results}:
            again = self.broadcast_each("update_weights", held, version, "drain")
            known = {result.replica for result in results}
            results += [late for late in self._taken(again) if late.replica not in known]
        return results

    def _taken(self, answers: list[Any]) -> list[WeightsResult]:
        """Return what replicas said; raise if none took the weights."""
        results: list[WeightsResult] = []
        errors: list[R3Error] = []
        for answer in answers:
            if isinstance(answer, WeightsResult):
                results.append(answer)
                continue
            errors.append(engine_error(answer, self.timeout_s))
            results.append(WeightsResult("unknown", -1, 0.0, f"{errors[-1]}"))
        if len(errors) == len(answers) or any(isinstance(e, WeightsMismatch) for e in errors):
            raise errors[0]
        return results

    def _holder_answer(self, ref: "ray.ObjectRef[Any]") -> Any:
        try:
            return ray.get(ref, timeout=self.timeout_s)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, R3Error) else error from None
        except RayError as error:
            raise StoreUnavailable(f"the holder of the weights does not answer: {error}") from None

    def _find(self, deployment: str) -> Any:
        from ray import serve

        try:
            handle = serve.get_deployment_handle(deployment, self.app)
        except (KeyError, serve.exceptions.RayServeException) as error:
            raise EngineUnavailable(
                f"no application {self.app!r} with a deployment {deployment} is being served in"
                f" {this_cluster()}: {line(error)}"
            ) from None
        # gRPC handles, the default in some set-ups, leak references and cap at 4 MiB.
        return handle.options(_by_reference=True)


def wait_answer(response: "DeploymentResponse[Any]", timeout_s: float) -> Any:
    """Return an engine call's answer; cancel it when the time is over (Serve would not)."""
    try:
        return response.result(timeout_s=timeout_s)
    except BaseException as error:
        response.cancel()  # type: ignore[no-untyped-call]
        if isinstance(error, _failures()):
            raise engine_error(error, timeout_s) from None
        raise


async def await_answer(response: Any, timeout_s: float) -> Any:
    """Do as `wait_answer`, awaited."""
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except _failures() as error:
        _check_cancelled()
        raise engine_error(error, timeout_s) from None
    finally:
        response.cancel()


def engine_error(error: BaseException, timeout_s: float) -> R3Error:
    """Return the typed error behind what Serve or Ray raised; raise it unchanged if none is."""
    from ray.serve.exceptions import BackPressureError, RayServeException

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, R3Error):
        return cause
    if isinstance(cause, BackPressureError):
        return EngineOverloaded(f"every engine replica's queue is full: {cause}")
    if isinstance(error, RayTaskError):
        raise error
    if isinstance(error, (TimeoutError, RayActorError, TaskCancelledError, RayServeException)):
        if isinstance(error, TimeoutError):
            return no_answer(timeout_s)
        return EngineUnavailable(f"no engine replica answered: {line(error)}")
    raise error


def no_answer(timeout_s: float) -> EngineUnavailable:
    """Return the error of a call that took too long."""
    return EngineUnavailable(f"no engine replica answered: no answer within {timeout_s} s")


def _check_cancelled() -> None:
    """Raise the cancellation that Serve's local testing mode makes an error of its own."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from None


def _failures() -> tuple[type[Exception], ...]:
    """What a handle call may end with; loaded late, since with Serve comes FastAPI."""
    from ray.serve.exceptions import RayServeException

    return (RayError, TimeoutError, RayServeException)
