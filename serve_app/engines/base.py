"""What every inference engine does, so that the deployment and its tests know only this."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from serve_app.records import Ids, Record
from serve_app.types import FinishReason, GenerateRequest, SleepLevel, UpdateMode

if TYPE_CHECKING:
    import torch

TakeRows = Callable[[str], Awaitable[Ids]]
"""Takes over rows that an engine put into the store by itself; their key ends."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model, as far as routes and request checks need it.

    ``layers`` counts all decoder layers; ``moe_layers`` are the global indices of the sparse
    ones, empty for a dense model.
    """

    family: str
    layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    vocab_size: int
    context_length: int


@dataclass(frozen=True, slots=True)
class EngineChunk:
    """What one request gained since its last chunk.

    ``finish_reason`` comes with the last chunk, and with it the record: P+G-1 rows of P prompt
    and G sampled tokens, fewer where the prompt was not processed to its end, None where no token
    was or recording was not asked for.
    ``text`` is new text, already cut at a stop string. A stop token is a token.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason | None = None
    record: Record | None = None
    weight_version: int = 0
    error: str | None = None


@runtime_checkable
class Proving(Protocol):
    """An engine that proves itself with a request of its own before it serves others'."""

    async def ready(self) -> None:
        """Wait until it serves; raise `EngineUnavailable` and say why it never will."""
        ...


class Engine(Protocol):
    """An inference engine in this process, driven from one event loop.

    Every method is called on that loop and none may block it. Requests run concurrently.
    """

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        ...

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses."""
        ...

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a request that this model can never serve."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineChunk, None]:
        """Sample one rollout; the last chunk has a finish reason.

        Raises `InvalidRequest`, `EngineOverloaded` when the waiting queue is full, or
        `EngineAsleep`. Closing the iterator aborts the request.
        """
        ...

    def generate_group(
        self, request: GenerateRequest, n: int
    ) -> AsyncGenerator[tuple[int, EngineChunk], None]:
        """Sample ``n`` rollouts of one prompt, which is processed once; yield (member, chunk).

        Member *i* is sampled as ``request.member(i)``. Raises as `generate` does.
        """
        ...

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, group or member, or all (None); return how many rollouts ended.

        They end with finish reason ``abort`` and what was sampled so far.
        """
        ...

    async def update_weights(
        self, state: "Mapping[str, torch.Tensor]", version: int, mode: UpdateMode
    ) -> None:
        """Serve ``state`` (exactly the names of ``model.state_dict()``) from now on.

        ``abort`` ends what runs first, ``drain`` lets it finish while new requests wait, so
        that every record has one version. Raises `WeightsMismatch`, and the old ones stay.
        """
        ...

    @property
    def sleep_level(self) -> SleepLevel | None:
        """How deep it sleeps, None while it serves."""
        ...

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take the weights off the device; level 2 forgets them.

        Until `wake`, requests and weights are refused with `EngineAsleep`.
        """
        ...

    async def wake(
        self, state: "Mapping[str, torch.Tensor] | None" = None, version: int = 0
    ) -> None:
        """Serve again, with ``state`` if given; after level 2 else as the checkpoint has it.

        Nothing happens where it serves already. Raises `WeightsMismatch` and sleeps on where
        ``state`` does not fit.
        """
        ...

    def check_health(self) -> None:
        """Raise `EngineUnavailable` if the engine cannot serve any more, or makes no progress."""
        ...

    async def stop(self) -> None:
        """End all requests and free the model. Idempotent."""
        ...


class Stepping(Engine, Protocol):
    """An engine whose steps are those of its group: new weights come to all of it between two."""

    @property
    def failed(self) -> str | None:
        """Why it serves nothing any more, None while it may."""
        ...

    @property
    def workers(self) -> "list[Any]":
        """The actors that hold its model, in the order of their ranks."""
        ...

    def check_weights(self, state: "Mapping[str, torch.Tensor]") -> None:
        """Raise `WeightsMismatch` where ``state`` does not fit; nothing is stopped for that."""
        ...

    def resting(self, *, abort: bool) -> AbstractAsyncContextManager[None]:
        """Let nothing start; first end what runs, or wait for it."""
        ...

    async def load(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Serve ``state`` after the rest that it is called in. Raises `WeightsMismatch`."""
        ...
