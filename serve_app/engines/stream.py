"""The way of one request's chunks from the step thread to its reader on an event loop."""

import asyncio
from collections.abc import Iterable

from serve_app.engines.base import EngineChunk


class ChunkStream:
    """Chunks of one request, for one reader. All but the constructor runs on the loop.

    ``filled`` is set when there are some; a group's streams share it.
    """

    def __init__(self, filled: asyncio.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self._chunks: list[EngineChunk] = []
        self._filled = filled

    def put(self, chunk: EngineChunk) -> None:
        """Add a chunk; the one with a finish reason is the last."""
        self._chunks.append(chunk)
        self._filled.set()

    def take(self) -> EngineChunk | None:
        """Take all that are there as one, so that a slow reader gets fewer; None if none are."""
        chunks, self._chunks = self._chunks, []
        return merge(chunks) if chunks else None


def merge(chunks: list[EngineChunk]) -> EngineChunk:
    """Return one chunk that says the same as several."""
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    return EngineChunk(
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=[logprob for chunk in chunks for logprob in chunk.logprobs],
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason,
        record=last.record,
        weight_version=last.weight_version,
        error=last.error,
    )


class Outbox:
    """What a step produced, handed to the event loops in one call each: a wake-up is dear."""

    def __init__(self) -> None:
        self._pairs: dict[asyncio.AbstractEventLoop, list[tuple[ChunkStream, EngineChunk]]] = {}

    def add(self, stream: ChunkStream, chunk: EngineChunk) -> None:
        """Keep a chunk for the next flush."""
        self._pairs.setdefault(stream.loop, []).append((stream, chunk))

    def flush(self) -> set[asyncio.AbstractEventLoop]:
        """Hand everything over; return the loops that are closed, whose readers are gone."""
        pairs, self._pairs = self._pairs, {}
        closed = set()
        for loop, items in pairs.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                closed.add(loop)
        return closed


def _deliver(pairs: Iterable[tuple[ChunkStream, EngineChunk]]) -> None:
    for stream, chunk in pairs:
        stream.put(chunk)
