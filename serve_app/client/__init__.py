"""What a trainer holds: the two clients, and the ways by which they reach a served application."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve_app.client.awaited import AsyncRoutedExpertsClient
    from serve_app.client.blocking import RoutedExpertsClient

__all__ = ["AsyncRoutedExpertsClient", "RoutedExpertsClient"]


def __getattr__(name: str) -> Any:
    """Load the clients, and with them Ray, only when they are asked for."""
    if name == "RoutedExpertsClient":
        from serve_app.client.blocking import RoutedExpertsClient

        return RoutedExpertsClient
    if name == "AsyncRoutedExpertsClient":
        from serve_app.client.awaited import AsyncRoutedExpertsClient

        return AsyncRoutedExpertsClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
