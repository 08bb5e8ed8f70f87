"""Puts from an actor's event loop: records that wait together travel together.

While one batch is on its way, new records collect; up to `_IN_FLIGHT` batches overlap so that
the shard pulls one while it acknowledges the other.

A batch belongs to none of the calls whose records it carries: Ray cancels what a cancelled call
has called in its turn, and so may Serve do to a call just answered. So batches are sent in an
empty context, in which Ray sees no call.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context

from serve_app.errors import StoreError, without_frames
from serve_app.records import Record
from serve_app.store.offers import Offer

_IN_FLIGHT = 2
_BATCH_RECORDS = 128
_BATCH_BYTES = 128 << 20

Waiting = tuple[Offer, Record, asyncio.Future[str]]
Send = Callable[[Sequence[tuple[Offer, Record]]], Awaitable[list[str | StoreError]]]


class Producer:
    """Groups the puts of one event loop into batches and sends them with ``send``."""

    def __init__(self, send: Send, batch_bytes: int = _BATCH_BYTES) -> None:
        self._send = send
        self._batch_bytes = min(batch_bytes, _BATCH_BYTES)
        self._waiting: deque[Waiting] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    async def put(self, offer: Offer, record: Record) -> str:
        """Send a record with whatever else waits; return its key, or raise why it has none."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((offer, record, done))
        if len(self._senders) < _IN_FLIGHT:
            sender = asyncio.create_task(self._run(), context=Context())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return await done

    async def _run(self) -> None:
        await asyncio.sleep(0)  # puts of the same turn of the loop travel in the first batch too
        while batch := self._next_batch():
            answers: Sequence[str | Exception]
            try:
                answers = await self._send([(offer, record) for offer, record, _ in batch])
            except StoreError as error:
                answers = [without_frames(error)] * len(batch)
            except Exception as error:  # noqa: BLE001  (whatever it is belongs to the callers)
                answers = [error] * len(batch)
            for (_, _, done), answer in zip(batch, answers, strict=True):
                if done.cancelled():
                    continue
                if isinstance(answer, Exception):
                    done.set_exception(answer)
                else:
                    done.set_result(answer)

    def _next_batch(self) -> list[Waiting]:
        batch: list[Waiting] = []
        nbytes = 0
        while self._waiting and len(batch) < _BATCH_RECORDS:
            nbytes += self._waiting[0][1].meta.nbytes
            if batch and nbytes > self._batch_bytes:
                break
            batch.append(self._waiting.popleft())
        return batch
