"""What one rollout's chunks add up to, and the result made of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from serve_app.engines.base import EngineChunk
from serve_app.types import GenerateRequest, GenerateResult


@dataclass(frozen=True, slots=True)
class Routes:
    """A key or an array ``[rows, layers, top_k]``, and the rows it has; or why there is none.

    ``continued_rows`` of them are those of the key that the request continued.
    """

    value: str | npt.NDArray[Any] | None = None
    rows: int = 0
    error: str | None = None
    continued_rows: int = 0


@dataclass(slots=True)
class Answer:
    """One rollout as far as it came; ``last`` is the chunk with the finish reason."""

    request: GenerateRequest
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    last: EngineChunk | None = None

    def add(self, chunk: EngineChunk) -> None:
        """Take in the next chunk."""
        self.output_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.text.append(chunk.text)
        if chunk.finish_reason is not None:
            self.last = chunk

    def result(self, routes: Routes) -> GenerateResult:
        """Return the finished rollout."""
        assert self.last is not None
        assert self.last.finish_reason is not None
        return GenerateResult(
            request_id=self.request.request_id,
            output_ids=self.output_ids,
            logprobs=self.logprobs,
            text="".join(self.text),
            finish_reason=self.last.finish_reason,
            prompt_tokens=len(self.request.input_ids),
            weight_version=self.last.weight_version,
            routed_experts=routes.value,
            num_routed_tokens=routes.rows,
            error=self.last.error,
            routed_experts_error=routes.error,
            continued_rows=routes.continued_rows,
        )
