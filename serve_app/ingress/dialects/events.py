"""Server-sent events, and JSON answers with arrays of expert ids in them."""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import R3Error
from serve_app.ingress.edge.abandonment import Pieces
from serve_app.ingress.guard.errors import body_of

DONE = b"data: [DONE]\n\n"
_ROWS_AT_ONCE = 64


def event(body: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


async def ended(events: AsyncGenerator[bytes, None]) -> Pieces:
    """End a stream as clients expect it: with ``[DONE]``, and before it an error if one came."""
    begun = False
    async with aclosing(events):
        try:
            async for piece in events:
                yield piece
                begun = True
        except R3Error as error:
            if not begun:
                raise
            yield event({"error": body_of(error)})
    yield DONE


class Json:
    """Makes JSON with expert arrays as nested lists, without holding the event loop up.

    One call over a whole array would block every other request for seconds.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def routes(self, value: str | npt.NDArray[Any] | None) -> str | None:
        """Return what stands for routed experts in a body until it is made."""
        if not isinstance(value, np.ndarray):
            return value
        mark = uuid.uuid4().hex
        self._arrays[mark] = value
        return mark

    async def make(self, body: dict[str, Any]) -> bytes:
        """Return the body's bytes."""
        made = json.dumps(body, separators=(",", ":")).encode()
        for mark, ids in self._arrays.items():
            rows = await asyncio.to_thread(_nested, ids)
            made = made.replace(b'"%s"' % mark.encode(), rows, 1)
        return made

    async def event(self, body: dict[str, Any]) -> bytes:
        """Return the body as an event."""
        return b"data: " + await self.make(body) + b"\n\n"


def _nested(ids: npt.NDArray[Any]) -> bytes:
    rows = (
        json.dumps(ids[first : first + _ROWS_AT_ONCE].tolist(), separators=(",", ":"))[1:-1]
        for first in range(0, len(ids), _ROWS_AT_ONCE)
    )
    return b"[" + ",".join(rows).encode() + b"]"
