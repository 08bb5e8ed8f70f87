"""Records of finished rollouts on their way into the store: keys, and what they continue."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar

from serve_app.continuing import (
    captured,
    compare,
    covered,
    end_of,
    same_by_hash,
    up_to,
)
from serve_app.engines.base import ModelInfo
from serve_app.errors import PrefixMismatch, RecordError
from serve_app.records import ALL_TRACKS, Ids, Record, RecordMeta, new_part_of
from serve_app.store.base import RecordStore
from serve_app.store.keys import shorten
from serve_app.types import GenerateRequest, OnDivergence

T = TypeVar("T")

_AT_ONCE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Earlier:
    """Rows that a rollout need not store: the first ``rows`` of its sequence, under ``key``.

    ``is_cut``: the key has more, which are another sequence's.
    """

    key: str
    rows: int
    is_cut: bool = False

    @property
    def cut(self) -> int | None:
        """The position where the key's rows end for this sequence, None for all of them."""
        return self.rows if self.is_cut else None


class RouteKeys:
    """Turns one replica's records into keys. The store is found when it is first needed."""

    def __init__(self, connect: Callable[[], Awaitable[RecordStore]]) -> None:
        self._connect = connect
        self._connecting = asyncio.Lock()
        self._store: RecordStore | None = None

    async def earlier(
        self,
        key: str,
        tokens: Sequence[int],
        info: ModelInfo,
        on_divergence: OnDivergence = "raise",
    ) -> Earlier | None:
        """Return what ``key`` has of a sequence that begins with ``tokens``, None for nothing.

        Raises why the key cannot be read, `RecordError` where it is of another model, and
        `PrefixMismatch` where it was captured on other tokens, or on more of them; with
        ``on_divergence="prefix"`` what they have in common is returned instead.
        """
        store = await self._found()
        chain = await store.adescribe(key)
        what = f"continue_from {shorten(key)}"
        if not isinstance(chain, list):
            raise type(chain)(f"{what}: {chain}")
        for meta in chain:
            _check_model(meta, info, key)
        if same_by_hash(chain, tokens):
            rows, end = covered(chain), end_of(chain)
        else:
            found = await asyncio.to_thread(compare, store, key, chain, tokens)
            rows, end = found.covered, found.end
            if on_divergence == "prefix":
                rows = min(found.common, len(tokens))
            else:
                found.check_same(what)
                found.check_known(what)
                if end > len(tokens):
                    raise PrefixMismatch(
                        f"{what}: expected at least {end} tokens, got {len(tokens)}"
                    )
        rows = captured(chain, rows)  # this engine processes the rest anew
        return Earlier(key, rows, is_cut=rows < end) if rows else None

    async def put(
        self,
        request: GenerateRequest,
        record: Record,
        earlier: Earlier | None,
    ) -> str:
        """Store the rows of ``record`` that are new; the key reads as the whole sequence.

        If the caller is cancelled, what was put by then is released: nobody will ever know its
        key.
        """
        put = _apart(self._put(request, record, earlier))
        try:
            return await asyncio.shield(put)
        except asyncio.CancelledError:
            put.add_done_callback(self._release_unread)
            raise

    async def take(self, key: str) -> Ids:
        """Return the rows that an engine put by itself, and end their key.

        They stay readable as long as the array is held.
        """
        store = await self._found()
        (found,) = await asyncio.to_thread(store.fetch, [key])
        if not isinstance(found, list):
            raise type(found)(f"put by the engine itself: {found}")
        await asyncio.to_thread(store.release, [key])
        return found[-1].ids

    async def release(self, keys: Sequence[str]) -> None:
        """End keys that nobody will read, even if the caller is cancelled meanwhile."""
        await asyncio.shield(_apart(self._release(keys)))

    @asynccontextmanager
    async def shared_rows(
        self,
        request: GenerateRequest,
        record: Record,
        earlier: Earlier | None,
    ) -> AsyncIterator[Earlier]:
        """Put the rows that several rollouts have in common; theirs keep them alive afterwards."""
        key = await self.put(request.model_copy(update={"tag": None}), record, earlier)
        try:
            yield Earlier(key, record.meta.stop)
        finally:
            await self.release([key])

    async def _put(
        self,
        request: GenerateRequest,
        record: Record,
        earlier: Earlier | None,
    ) -> str:
        store, near = await self._found(), list[str]()
        parent, cut = None, None
        if earlier is not None:
            parent, cut = earlier.key, earlier.cut
            if not store.is_local(parent):
                near = await self._copied(earlier, request.lease_s)
                parent, cut = near[-1], None
            record = await self._new_part(record, earlier.rows)
        try:
            return await store.aput(
                record,
                tag=request.tag,
                lease_s=request.lease_s,
                parent=parent,
                parent_rows=cut,
            )
        finally:
            if near:
                await asyncio.to_thread(store.release, near)

    async def _release(self, keys: Sequence[str]) -> None:
        await asyncio.to_thread((await self._found()).release, keys)

    async def _new_part(self, record: Record, covered: int) -> Record:
        """Cut off what is covered; here if that is little work, since a thread takes longer."""
        new = max(record.meta.stop - covered, 1)
        if new * record.meta.nbytes <= _AT_ONCE_BYTES * record.meta.rows:
            return new_part_of(record, covered)
        return await asyncio.to_thread(new_part_of, record, covered)

    async def _copied(self, earlier: Earlier, lease_s: float | None) -> list[str]:
        """Copy a chain to this node, each part with its own version; return the copies' keys."""
        store = await self._found()
        (segments,) = await asyncio.to_thread(store.fetch, [earlier.key], None, ALL_TRACKS)
        if not isinstance(segments, list):
            raise type(segments)(f"continue_from {shorten(earlier.key)}: {segments}")
        keys: list[str] = []
        try:
            for segment in await asyncio.to_thread(up_to, segments, earlier.cut):
                parent = keys[-1] if keys else None
                keys.append(await store.aput(segment, lease_s=lease_s, parent=parent))
        except BaseException:
            await asyncio.to_thread(store.release, keys)
            raise
        return keys

    async def _found(self) -> RecordStore:
        async with self._connecting:
            if self._store is None:
                self._store = await self._connect()
            return self._store

    def _release_unread(self, put: "asyncio.Future[str]") -> None:
        if not put.cancelled() and put.exception() is None and self._store is not None:
            asyncio.get_running_loop().run_in_executor(None, self._store.release, [put.result()])


def _apart(work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Begin work that is not its caller's alone: Ray cancels what a cancelled call has called."""
    return asyncio.create_task(work, context=Context())


def _check_model(meta: RecordMeta, info: ModelInfo, key: str) -> None:
    expected = (info.layers, info.top_k, info.num_experts, info.moe_layers)
    found = (meta.layers, meta.top_k, meta.num_experts, meta.moe_layers)
    if found != expected:
        raise RecordError(
            f"continue_from {shorten(key)}: expected (layers, top_k, experts, MoE layers)"
            f" {expected} as this model has, got {found}"
        )
