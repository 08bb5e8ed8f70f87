"""r3serve: rollout routing replay for MoE RL as a Ray Serve deployment graph."""

from typing import TYPE_CHECKING, Any

from serve_app.types import (
    ExpertBatch,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    RankSlice,
    RoutedSequence,
)

if TYPE_CHECKING:
    from serve_app.client import AsyncRoutedExpertsClient, RoutedExpertsClient

__all__ = [
    "AsyncRoutedExpertsClient",
    "ExpertBatch",
    "GenerateChunk",
    "GenerateRequest",
    "GenerateResult",
    "RankSlice",
    "RoutedExpertsClient",
    "RoutedSequence",
]


def __getattr__(name: str) -> Any:
    """Load the clients, and with them Ray, only when they are asked for."""
    if name in ("AsyncRoutedExpertsClient", "RoutedExpertsClient"):
        from serve_app import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
