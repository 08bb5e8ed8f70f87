"""``/v1/chat/completions``: OpenAI's chat, with LMDeploy's token ids and routes."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve_app.errors import InvalidRequest
from serve_app.ingress.dialects.choices import Choices
from serve_app.ingress.dialects.events import Json, ended, event
from serve_app.ingress.dialects.generate import pairs, text_of
from serve_app.ingress.dialects.openai import Envelope, OpenAIBody, UsageBody, without_nulls
from serve_app.ingress.dialects.sampling import TokenIds
from serve_app.ingress.dialects.text import AsSampled
from serve_app.ingress.edge.abandonment import Answer, Pieces
from serve_app.ingress.edge.edge import Ingress
from serve_app.ingress.edge.prompts import Prompts
from serve_app.ingress.edge.replica import Edge
from serve_app.ingress.guard.errors import sampling
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult

router = APIRouter()


class ResponseFormat(BaseModel):
    """What form the answer must have."""

    type: str


class ChatBody(OpenAIBody):
    """A chat, or token ids where ``messages`` is empty."""

    messages: list[dict[str, Any]]
    input_ids: TokenIds | None = None
    image_data: Any = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "max"] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    return_token_ids: bool | None = False
    return_logprob: bool | None = False

    async def to_request(self, edge: Ingress) -> GenerateRequest:
        """Return the engine's request; raise `InvalidRequest` for what cannot be meant."""
        self.check_model(edge)
        self.check_supported()
        self._check_supported_here()
        return await self.sampled(
            edge, await self._prompt(edge.prompts), min_new_tokens=self.min_new_tokens
        )

    async def _prompt(self, prompts: Prompts) -> Sequence[int]:
        if self.messages:
            if self.input_ids is not None:
                raise InvalidRequest("input_ids cannot be used when messages is non-empty.")
            return await prompts.render(self.messages, self._offered_tools(), self._options())
        if self.input_ids is None:
            raise InvalidRequest("messages must not be empty unless input_ids is set.")
        if not self.input_ids:
            raise InvalidRequest("The input_ids must not be an empty list.")
        return self.input_ids

    def _check_supported_here(self) -> None:
        if self.image_data is not None:
            raise InvalidRequest("image_data is not supported: expected text or token ids")
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs: expected 0, only sampled tokens have any")
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequest("response_format: expected text, nothing else is enforced here")
        if self.tool_choice not in ("auto", "none"):
            raise InvalidRequest("tool_choice: expected auto or none, no tool can be forced here")

    def _offered_tools(self) -> list[dict[str, Any]] | None:
        return self.tools if self.tools and self.tool_choice != "none" else None

    def _options(self) -> dict[str, Any]:
        own = {"enable_thinking": self.enable_thinking, "reasoning_effort": self.reasoning_effort}
        given = {name: value for name, value in own.items() if value is not None}
        return given | (self.chat_template_kwargs or {})


class Message(BaseModel):
    """What the model said. Tool calls stay in the text: what they look like is the model's."""

    role: str | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """One rollout; ``delta`` instead of ``message`` in events."""

    index: int
    message: Message | None = None
    delta: Message | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    output_token_logprobs: list[tuple[float, int]] | None = None
    output_ids: list[int] | None = None
    routed_experts: str | list[Any] | None = None
    routed_experts_error: str | None = None
    weight_version: int | None = None


class ChatAnswer(BaseModel):
    """A chat completion, or one of its chunks."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody | None = None


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=sampling(ChatAnswer),
)
async def chat_completions(body: ChatBody, edge: Edge) -> Answer:
    """Continue a chat."""
    request, calls = await body.to_request(edge), edge.calls()
    choices = Choices(calls, [request], body.choices)
    texts = [await text_of(edge, body) for _ in range(body.choices)]
    prompts = await edge.prompts.loaded() if body.logprobs else None
    said = _Choice(body, prompts)
    if body.stream:
        pieces = ended(_events(body, choices, texts, said))
    else:
        pieces = _whole(body, choices, texts, said)
    return Answer(pieces, events=bool(body.stream), abandoned=calls.abandon)


class _Choice:
    """The part of a choice that answers and events share."""

    def __init__(self, body: ChatBody, prompts: Prompts | None) -> None:
        self._body = body
        self._prompts = prompts

    def fields(
        self, ids: list[int], logprobs: list[float], result: GenerateResult | None, out: Json
    ) -> dict[str, Any]:
        body = self._body
        wanted = body.return_routed_experts and result is not None
        return {
            "logprobs": self._logprobs(ids, logprobs),
            "output_token_logprobs": pairs(logprobs, ids) if body.return_logprob else None,
            "finish_reason": None if result is None else result.finish_reason,
            "output_ids": ids if body.return_token_ids else None,
            "routed_experts": out.routes(result.routed_experts) if result and wanted else None,
            "routed_experts_error": result.routed_experts_error if result and wanted else None,
            "weight_version": None if result is None else result.weight_version,
        }

    def _logprobs(self, ids: list[int], logprobs: list[float]) -> dict[str, Any] | None:
        if self._prompts is None:
            return None
        content = []
        for token_id, logprob in zip(ids, logprobs, strict=True):
            token = self._prompts.token(token_id)
            content.append(
                {
                    "token": token,
                    "bytes": list(token.encode("utf-8", "replace")),
                    "logprob": logprob,
                    "top_logprobs": [],
                }
            )
        return {"content": content}


async def _whole(
    body: ChatBody, choices: Choices, texts: Sequence[AsSampled], said: _Choice
) -> Pieces:
    results, out = await choices.results(), Json()
    found = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text.of_result(result)},
            **said.fields(result.output_ids, result.logprobs, result, out),
        }
        for index, (text, result) in enumerate(zip(texts, results, strict=True))
    ]
    envelope = Envelope("chatcmpl", "chat.completion", body.model)
    yield await out.make(envelope.around(found, usage=choices.usage.body()))


async def _events(
    body: ChatBody, choices: Choices, texts: Sequence[AsSampled], said: _Choice
) -> AsyncGenerator[bytes, None]:
    envelope = Envelope("chatcmpl", "chat.completion.chunk", body.model)
    more: dict[str, Any] = {"usage": None} if body.usage_wanted else {}
    silent = set(range(len(texts)))
    async with aclosing(choices.chunks()) as chunks:
        async for index, chunk in chunks:
            out = Json()
            delta = _delta(chunk, texts[index], first=index in silent)
            silent.discard(index)
            choice = {
                "index": index,
                "delta": delta,
                **said.fields(chunk.output_ids, chunk.logprobs, chunk.result, out),
            }
            yield await out.event(envelope.around([without_nulls(choice)], **more))
    if body.usage_wanted:
        yield event(envelope.around([], usage=choices.usage.body()))


def _delta(chunk: GenerateChunk, text: AsSampled, *, first: bool) -> dict[str, str]:
    content = text.of_chunk(chunk)
    return {"role": "assistant", "content": content} if first else {"content": content}
