"""One request while LMDeploy samples it: what it returns, and when it ends."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy.typing as npt

from serve_app.engines.base import EngineChunk, ModelInfo
from serve_app.engines.detokenizer import Decode, Detokenizer
from serve_app.engines.stop_strings import StopStrings
from serve_app.engines.stream import ChunkStream
from serve_app.records import Record, make_record
from serve_app.types import FinishReason, GenerateRequest


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rollout ended; its last chunk follows when its rows are there."""

    reason: FinishReason
    error: str | None = None


class Rollout:
    """Tokens, text and stop rules of one request. All of it runs on the engine's loop.

    ``leader`` is a rollout of the same prompt: once it has begun the prefix cache has it.
    """

    def __init__(
        self,
        request: GenerateRequest,
        stream: ChunkStream,
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
        decode: Decode | None,
        group: str | None = None,
    ) -> None:
        self.request = request
        self.group = group
        self.stream = stream
        self.stop_ids = stop_ids
        self.max_new_tokens = max_new_tokens
        self.weight_version = 0
        self.session_id: int | None = None
        self.output: list[int] = []
        self.ending: Ending | None = None
        self.aborted = asyncio.Event()
        self.begun = asyncio.Event()  # its prompt was processed, or never will be
        self.done = asyncio.Event()
        self.leader: Rollout | None = None
        self._text = None if decode is None else Detokenizer(decode)
        self._stops = StopStrings(request.stop)
        self._pending = EngineChunk([], [], "")

    def take(self, token_ids: list[int], logprobs: list[float]) -> None:
        """Add what was sampled; what came after the end is not part of the rollout."""
        self.begun.set()
        if self.ending is not None:
            return
        tokens: list[int] = []
        text: list[str] = []
        for token, logprob in zip(token_ids, logprobs, strict=True):
            if self.ending is not None:
                break
            if not isfinite(logprob):
                self.ending = Ending("error", "the model's logits are not finite")
                break
            stops = token in self.stop_ids
            if stops and not self.request.include_stop_token:
                self.ending = Ending("stop")
                break
            tokens.append(token)
            self.output.append(token)
            text.append(self._feed(token))
            if stops or self._stops.found:
                self.ending = Ending("stop")
            elif len(self.output) == self.max_new_tokens:
                self.ending = Ending("length")
        if self.ending is not None and self.ending.error is None:
            text.append(self._finish())
            if self._stops.found:
                self.ending = Ending("stop")
        self._send(tokens, logprobs[: len(tokens)], "".join(text))

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """End it where it is, unless it has ended already."""
        if self.ending is None:
            self.ending = Ending(reason, error)
            self._send([], [], "" if error else self._finish())

    def fail(self, error: str) -> None:
        """Call an ended rollout failed; it keeps its tokens."""
        self.ending = Ending("error", error)

    def close(self, record: Record | None) -> None:
        """Send the last chunk."""
        assert self.ending is not None
        self.begun.set()
        pending, ending = self._pending, self.ending
        self.stream.put(
            EngineChunk(
                pending.token_ids,
                pending.logprobs,
                pending.text,
                finish_reason=ending.reason,
                record=None if ending.error else record,
                weight_version=self.weight_version,
                error=ending.error,
            )
        )
        self.done.set()

    def record(self, rows: npt.NDArray[Any], info: ModelInfo) -> Record | None:
        """Return P+G-1 rows for the G tokens that are returned, None where there are none.

        LMDeploy has one more for a stop token that is not returned, and several more where a
        stop string was found in text that it had already gone past. Copies them: not cheap.
        """
        tokens = [*self.request.input_ids, *self.output]
        count = min(len(rows), len(tokens) - 1)
        if count == 0:
            return None
        return make_record(
            rows[:count],
            num_experts=info.num_experts,
            moe_layers=info.moe_layers,
            weight_version=self.weight_version,
            tokens=tokens[:count],
            repeats="ours",
        )

    def _feed(self, token: int) -> str:
        if self._text is None:
            return ""
        text = self._text.feed(token)
        early = len(self.output) < self.request.min_new_tokens
        return text if early else self._stops.feed(text)

    def _finish(self) -> str:
        if self._text is None:
            return ""
        return self._stops.feed(self._text.finish()) + self._stops.finish()

    def _send(self, tokens: list[int], logprobs: list[float], text: str) -> None:
        """Hand on a chunk; the last one waits for its record."""
        chunk = EngineChunk(tokens, logprobs, text, weight_version=self.weight_version)
        if self.ending is not None:
            self._pending = chunk
        elif tokens:
            self.stream.put(chunk)
