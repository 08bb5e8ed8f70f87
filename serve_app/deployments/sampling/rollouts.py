"""Rollouts from a request to their keys: what a replica asks of its engine, whatever its size."""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from serve_app.engines.base import Engine, ModelInfo
from serve_app.types import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    SleepLevel,
    UpdateMode,
)
from serve_app.weights.holder import Published
from serve_app.weights.parts import Inbox

if TYPE_CHECKING:
    import torch

Load = Callable[..., Engine]
"""Loads the engine that `EngineArgs` name; called as `load_engine` is."""


class Rollouts(Protocol):
    """One engine, or the ranks of a group that step together. All on one event loop."""

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        ...

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses."""
        ...

    @property
    def sleep_level(self) -> SleepLevel | None:
        """How deep it sleeps, None while it serves."""
        ...

    def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout; the last chunk carries the whole result."""
        ...

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end."""
        ...

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt; it is processed and its rows are stored once."""
        ...

    async def abort(self, request_id: str | None) -> int:
        """Abort one request, or all; return how many rollouts ended."""
        ...

    async def abandon(self, request_id: str, members: int) -> None:
        """Abort a request whose client is gone, and release its keys."""
        ...

    async def update_weights(self, weights: Published, version: int, mode: UpdateMode) -> None:
        """Serve published weights from now on; raise `WeightsMismatch`, and the old ones stay."""
        ...

    async def serve_state(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Serve a state dict of this process, at once."""
        ...

    def inbox(self) -> Inbox:
        """Return where weights that come in parts are collected."""
        ...

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take the weights off the device; level 2 forgets them."""
        ...

    async def wake(self, weights: "Published | None", version: int) -> None:
        """Serve again, with published weights if given."""
        ...

    async def ready(self) -> None:
        """Wait until it serves; raise `EngineUnavailable` and say why it never will."""
        ...

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once it can serve no more."""
        ...
