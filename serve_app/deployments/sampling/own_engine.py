"""The rollouts of an engine in this process: sampled, their records turned into keys."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from serve_app.config import EngineArgs
from serve_app.deployments.sampling.answer import Answer
from serve_app.deployments.sampling.handing_out import HandingOut
from serve_app.deployments.sampling.inboxes import inbox_of
from serve_app.deployments.sampling.rollouts import Load
from serve_app.deployments.sampling.routes import Earlier, RouteKeys
from serve_app.deployments.sampling.unread import Unread
from serve_app.engines.base import ModelInfo, Proving
from serve_app.errors import InvalidRequest
from serve_app.store.base import RecordStore
from serve_app.types import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    SleepLevel,
    UpdateMode,
)
from serve_app.weights.holder import Published, unpack
from serve_app.weights.parts import Inbox

if TYPE_CHECKING:
    import torch


class OwnEngine:
    """Loads an engine and answers for it; see `Rollouts`. Its keys read on after this process."""

    def __init__(
        self, args: EngineArgs, connect: Callable[[], Awaitable[RecordStore]], load: Load
    ) -> None:
        self._args = args
        self._keys = RouteKeys(connect)
        self.engine = load(args, self._keys.take)
        self._unread = Unread()
        self._handing_out = HandingOut(args, self._keys, self._unread)

    @property
    def info(self) -> ModelInfo:
        """The served model."""
        return self.engine.info

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses."""
        return self.engine.weight_version

    @property
    def sleep_level(self) -> SleepLevel | None:
        """How deep it sleeps, None while it serves."""
        return self.engine.sleep_level

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout to its end."""
        async with aclosing(self.stream(request)) as chunks:
            async for chunk in chunks:
                if chunk.result is not None:
                    return chunk.result
        raise AssertionError("a stream ends with a result")

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Sample one rollout; the last chunk carries the whole result."""
        self._begin(request)
        answer, result = Answer(request), None
        async with (
            self._looking_up(request) as earlier,
            aclosing(self.engine.generate(request)) as chunks,
        ):
            async for chunk in chunks:
                await earlier
                answer.add(chunk)
                if chunk.finish_reason is not None:
                    result = answer.result(await self._handing_out.hand_out(answer, await earlier))
                yield GenerateChunk(
                    request.request_id, chunk.token_ids, chunk.logprobs, chunk.text, result
                )

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt; it is processed and its rows are stored once."""
        self._begin(request)
        found: dict[int, Answer] = {}
        async with (
            self._looking_up(request) as earlier,
            aclosing(self.engine.generate_group(request, n)) as chunks,
        ):
            async for index, chunk in chunks:
                await earlier
                found.setdefault(index, Answer(request.member(index))).add(chunk)
            answers = [found[index] for index in range(n)]
            routes = await self._handing_out.hand_out_group(request, answers, await earlier)
        return [answer.result(one) for answer, one in zip(answers, routes, strict=True)]

    async def abort(self, request_id: str | None) -> int:
        """Abort one request, or all; return how many rollouts ended."""
        return await self.engine.abort(request_id)

    async def abandon(self, request_id: str, members: int) -> None:
        """Abort a request whose client is gone, and release its keys."""
        await self.engine.abort(request_id)
        ids = [request_id, *(f"{request_id}-{index}" for index in range(members))]
        keys = [key for one in ids if (key := self._unread.abandon(one))]
        if keys:
            await self._keys.release(keys)

    async def update_weights(self, weights: Published, version: int, mode: UpdateMode) -> None:
        """Serve published weights from now on; the old ones stay if these do not fit."""
        state = await asyncio.to_thread(unpack, weights)
        await self.engine.update_weights(state, version, mode)

    async def serve_state(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Serve a state dict of this process, at once."""
        await self.engine.update_weights(state, version, "abort")

    def inbox(self) -> Inbox:
        """Return where weights that come in parts are collected: here, or in the workers."""
        return inbox_of(self.engine)

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take the weights off the device; level 2 forgets them."""
        await self.engine.sleep(level)

    async def wake(self, weights: "Published | None", version: int) -> None:
        """Serve again, with published weights if given."""
        if weights is None:
            await self.engine.wake()
        else:
            await self.engine.wake(await asyncio.to_thread(unpack, weights), version)

    async def ready(self) -> None:
        """Wait until it serves; raise `EngineUnavailable` and say why it never will."""
        if isinstance(self.engine, Proving):
            await self.engine.ready()

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once it can serve no more."""
        self.engine.check_health()

    def _begin(self, request: GenerateRequest) -> None:
        """Check a request as far as this process can tell, before anything is sampled."""
        self.engine.check(request)
        self._unread.begins(request.request_id)
        if request.continue_from is not None and not self._args.enable_transfer_obj_ref:
            raise InvalidRequest(
                "continue_from takes and makes keys, but enable_transfer_obj_ref is off in this"
                " engine's configuration"
            )

    @asynccontextmanager
    async def _looking_up(
        self, request: GenerateRequest
    ) -> AsyncIterator["asyncio.Task[Earlier | None]"]:
        """Look up what a request continues while its prompt is processed.

        Nothing is answered before the task is done: it raises what is wrong with the key.
        """
        task = asyncio.create_task(self._earlier(request))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # seen, even if sampling failed first

    async def _earlier(self, request: GenerateRequest) -> Earlier | None:
        if request.continue_from is None:
            return None
        return await self._keys.earlier(
            request.continue_from, request.input_ids, self.engine.info, request.on_divergence
        )
