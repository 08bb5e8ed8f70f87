"""Work that must not be left half-done."""

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(work: "asyncio.Future[T]") -> T:
    """Wait for work, whoever cancels that; a cancellation is raised afterwards."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
