"""Several rollouts of one or several prompts, as one answer or one stream of events."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from serve_app.ingress.dialects.generate import check_finished
from serve_app.ingress.edge.edge import EngineCalls, gathered
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult

_AHEAD = 64  # chunks that wait for a slow reader


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all choices; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, object]:
        """Return OpenAI's words for it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


class Choices:
    """``n`` rollouts of each prompt, numbered prompt by prompt."""

    def __init__(self, calls: EngineCalls, prompts: Sequence[GenerateRequest], n: int) -> None:
        self._calls = calls
        self._prompts = prompts
        self._n = n
        self._prompt_tokens = sum(len(request.input_ids) for request in prompts)
        self._completion_tokens = 0

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        return Usage(self._prompt_tokens, self._completion_tokens)

    async def results(self) -> list[GenerateResult]:
        """Sample all to their ends; raise if one failed."""
        if self._n == 1:
            results = await gathered([self._calls.result(one) for one in self._prompts])
        else:
            groups = [self._calls.group(one, self._n) for one in self._prompts]
            results = [result for group in await gathered(groups) for result in group]
        for result in results:
            check_finished(result)
            self._completion_tokens += len(result.output_ids)
        return results

    async def chunks(self) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
        """Yield (choice, chunk) as they come; raise if one failed."""
        requests = self._requests()
        merged = self._merged(requests) if len(requests) > 1 else self._numbered(0, requests[0])
        async with aclosing(merged) as chunks:
            async for index, chunk in chunks:
                self._completion_tokens += len(chunk.output_ids)
                if chunk.result is not None:
                    check_finished(chunk.result)
                yield index, chunk

    def _requests(self) -> list[GenerateRequest]:
        if self._n == 1:
            return list(self._prompts)
        return [one.member(index) for one in self._prompts for index in range(self._n)]

    async def _numbered(
        self, index: int, request: GenerateRequest
    ) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
        async with aclosing(self._calls.stream(request)) as chunks:
            async for chunk in chunks:
                yield index, chunk

    async def _merged(
        self, requests: Sequence[GenerateRequest]
    ) -> AsyncGenerator[tuple[int, GenerateChunk], None]:
        queue: asyncio.Queue[tuple[int, GenerateChunk] | BaseException | None] = asyncio.Queue(
            _AHEAD
        )

        async def read(index: int, request: GenerateRequest) -> None:
            try:
                async with aclosing(self._numbered(index, request)) as chunks:
                    async for pair in chunks:
                        await queue.put(pair)
                await queue.put(None)
            except Exception as error:  # noqa: BLE001  # raised below, in the reader's task
                await queue.put(error)

        tasks = [asyncio.create_task(read(*pair)) for pair in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
