"""``/v1/completions``: prompts as text or token ids, one or many."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve_app.errors import InvalidRequest
from serve_app.ingress.dialects.choices import Choices
from serve_app.ingress.dialects.events import Json, ended, event
from serve_app.ingress.dialects.generate import text_of
from serve_app.ingress.dialects.openai import Envelope, OpenAIBody, UsageBody, without_nulls
from serve_app.ingress.dialects.sampling import MAX_CHOICES, TokenIds
from serve_app.ingress.dialects.text import AsSampled
from serve_app.ingress.edge.abandonment import Answer, Pieces
from serve_app.ingress.edge.edge import Ingress
from serve_app.ingress.edge.replica import Edge
from serve_app.ingress.guard.errors import sampling
from serve_app.types import GenerateRequest, GenerateResult

router = APIRouter()


class CompletionBody(OpenAIBody):
    """A prompt, or several of a kind."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    suffix: str | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    async def to_requests(self, edge: Ingress) -> list[GenerateRequest]:
        """Return the engine's request for each prompt."""
        self.check_model(edge)
        self.check_supported()
        for name in ("suffix", "echo", "logprobs"):
            if getattr(self, name):
                raise InvalidRequest(f"{name} is not supported")
        if self.best_of not in (None, self.choices):
            raise InvalidRequest(f"best_of: expected n, which is {self.choices}")
        prompts = self._prompts()
        if not prompts or not all(prompts):
            raise InvalidRequest("The prompt must not be empty")
        if len(prompts) * self.choices > MAX_CHOICES:
            raise InvalidRequest(f"expected at most {MAX_CHOICES} choices of all prompts")
        if len(prompts) > 1 and self.session_id is not None and self.session_id >= 0:
            raise InvalidRequest("several prompts cannot share a session_id")
        ids = [
            await edge.prompts.tokenize(prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        return [await self.sampled(edge, one) for one in ids]

    def _prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class CompletionChoice(BaseModel):
    """One rollout."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None
    routed_experts: str | list[Any] | None = None
    routed_experts_error: str | None = None
    weight_version: int | None = None


class CompletionAnswer(BaseModel):
    """A completion, or one of its chunks."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


@router.post(
    "/v1/completions",
    response_model=None,
    responses=sampling(CompletionAnswer),
)
async def completions(body: CompletionBody, edge: Edge) -> Answer:
    """Continue prompts."""
    requests, calls = await body.to_requests(edge), edge.calls()
    choices = Choices(calls, requests, body.choices)
    texts = [await text_of(edge, body) for _ in range(len(requests) * body.choices)]
    if body.stream:
        pieces = ended(_events(body, choices, texts))
    else:
        pieces = _whole(body, choices, texts)
    return Answer(pieces, events=bool(body.stream), abandoned=calls.abandon)


def _choice(
    body: CompletionBody, index: int, text: str, result: GenerateResult | None, out: Json
) -> dict[str, Any]:
    wanted = result if body.return_routed_experts else None
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": None if result is None else result.finish_reason,
        "routed_experts": None if wanted is None else out.routes(wanted.routed_experts),
        "routed_experts_error": None if wanted is None else wanted.routed_experts_error,
        "weight_version": None if result is None else result.weight_version,
    }


async def _whole(body: CompletionBody, choices: Choices, texts: Sequence[AsSampled]) -> Pieces:
    results, out = await choices.results(), Json()
    found = [
        _choice(body, index, text.of_result(result), result, out)
        for index, (text, result) in enumerate(zip(texts, results, strict=True))
    ]
    envelope = Envelope("cmpl", "text_completion", body.model)
    yield await out.make(envelope.around(found, usage=choices.usage.body()))


async def _events(
    body: CompletionBody, choices: Choices, texts: Sequence[AsSampled]
) -> AsyncGenerator[bytes, None]:
    envelope = Envelope("cmpl", "text_completion", body.model)
    more: dict[str, Any] = {"usage": None} if body.usage_wanted else {}
    async with aclosing(choices.chunks()) as chunks:
        async for index, chunk in chunks:
            out = Json()
            choice = _choice(body, index, texts[index].of_chunk(chunk), chunk.result, out)
            yield await out.event(envelope.around([without_nulls(choice)], **more))
    if body.usage_wanted:
        yield event(envelope.around([], usage=choices.usage.body()))
