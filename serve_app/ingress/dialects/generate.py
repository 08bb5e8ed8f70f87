"""``/generate``: token ids or text in, token ids, log probabilities and routes out."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve_app.errors import EngineError, InvalidRequest
from serve_app.ingress.dialects.events import Json, ended
from serve_app.ingress.dialects.sampling import SamplingBody, TokenIds
from serve_app.ingress.dialects.text import AsSampled, WithSpecialTokens
from serve_app.ingress.edge.abandonment import Answer, Pieces
from serve_app.ingress.edge.edge import EngineCalls, Ingress
from serve_app.ingress.edge.replica import Edge
from serve_app.ingress.guard.errors import sampling
from serve_app.types import GenerateRequest, GenerateResult

router = APIRouter()


class GenerateBody(SamplingBody):
    """LMDeploy's ``/generate`` request: exactly one of ``prompt`` and ``input_ids``."""

    prompt: str | None = None
    input_ids: TokenIds | None = None
    image_data: Any = None
    return_logprob: bool | None = None
    top_logprobs_num: int | None = None
    logprob_start_len: Annotated[int, Field(ge=-1)] = -1
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 128
    stop_token_ids: list[int] | None = None

    async def to_request(self, edge: Ingress) -> GenerateRequest:
        """Return the engine's request; raise `InvalidRequest` for what cannot be meant."""
        self.check_supported()
        if self.image_data is not None:
            raise InvalidRequest("image_data is not supported: expected text or token ids")
        if self.logprob_start_len >= 0:
            raise InvalidRequest("log probabilities of the prompt are not supported")
        if self.top_logprobs_num:
            raise InvalidRequest("top_logprobs_num: expected 0, only sampled tokens have any")
        if self.max_tokens < 1:
            raise InvalidRequest("The max_tokens 0 must be a positive integer.")
        if (self.prompt is None) == (self.input_ids is None):
            raise InvalidRequest("You must specify exactly one of prompt or input_ids")
        if not (self.prompt or self.input_ids):
            raise InvalidRequest("The prompt or input_ids must not be empty")
        ids = self.input_ids or await edge.prompts.tokenize(self.prompt or "")
        request = self.request(
            ids, self.max_tokens, stop_token_ids=tuple(self.stop_token_ids or ()) or None
        )
        await edge.check_request(request)
        return request


class FinishReasonBody(BaseModel):
    """Why a rollout ended: ``stop``, ``length`` or ``abort``."""

    type: str


class MetaInfo(BaseModel):
    """Everything about an answer but its text and tokens.

    ``routed_experts`` is a key, a nested list ``[rows][layers][top_k]``, or null; then
    ``routed_experts_error`` says why, if it was asked for. ``continued_rows`` are there where the
    request had ``continue_from``.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: FinishReasonBody | None = None
    output_token_logprobs: list[tuple[float, int]] | None = None
    routed_experts: str | list[Any] | None = None
    routed_experts_error: str | None = None
    weight_version: int | None = None
    continued_rows: int | None = None


class GenerateAnswer(BaseModel):
    """LMDeploy's ``/generate`` answer, and each of its events."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo


@router.post(
    "/generate",
    response_model=None,
    responses=sampling(GenerateAnswer),
)
async def generate(body: GenerateBody, edge: Edge) -> Answer:
    """Sample one rollout."""
    request, calls = await body.to_request(edge), edge.calls()
    text = await text_of(edge, body)
    if body.stream:
        pieces = ended(_events(calls, request, body, text))
    else:
        pieces = _whole(calls, request, body, text)
    return Answer(pieces, events=bool(body.stream), abandoned=calls.abandon)


async def text_of(edge: Ingress, body: SamplingBody) -> AsSampled:
    """Return what gives one choice's text its form."""
    if body.skip_special_tokens is not False:
        return AsSampled()
    return WithSpecialTokens(await edge.prompts.loaded(), body.stops)


def check_finished(result: GenerateResult) -> None:
    """Raise if sampling failed in the engine."""
    if result.finish_reason == "error":
        raise EngineError(result.error or "sampling failed")


def pairs(logprobs: Sequence[float], ids: Sequence[int]) -> list[tuple[float, int]] | None:
    """Return LMDeploy's (log probability, token id) pairs, None for none."""
    return list(zip(logprobs, ids, strict=True)) or None


async def _whole(
    calls: EngineCalls, request: GenerateRequest, body: GenerateBody, text: AsSampled
) -> Pieces:
    result = await calls.result(request)
    check_finished(result)
    out = Json()
    meta = _meta(request, len(result.output_ids), out, result)
    if body.return_logprob:
        meta["output_token_logprobs"] = pairs(result.logprobs, result.output_ids)
    yield await out.make(
        {"text": text.of_result(result), "output_ids": result.output_ids, "meta_info": meta}
    )


async def _events(
    calls: EngineCalls, request: GenerateRequest, body: GenerateBody, text: AsSampled
) -> Pieces:
    count = 0
    async with aclosing(calls.stream(request)) as chunks:
        async for chunk in chunks:
            if chunk.result is not None:
                check_finished(chunk.result)
            count += len(chunk.output_ids)
            out = Json()
            meta = _meta(request, count, out, chunk.result)
            if body.return_logprob:
                meta["output_token_logprobs"] = pairs(chunk.logprobs, chunk.output_ids)
            yield await out.event(
                {"text": text.of_chunk(chunk), "output_ids": chunk.output_ids, "meta_info": meta}
            )


def _meta(
    request: GenerateRequest, tokens: int, out: Json, result: GenerateResult | None
) -> dict[str, Any]:
    meta = {
        "prompt_tokens": len(request.input_ids),
        "completion_tokens": tokens,
        "finish_reason": None if result is None else {"type": result.finish_reason},
        "output_token_logprobs": None,
        "routed_experts": None if result is None else out.routes(result.routed_experts),
        "routed_experts_error": None if result is None else result.routed_experts_error,
        "weight_version": None if result is None else result.weight_version,
    }
    if request.continue_from is not None:
        meta["continued_rows"] = None if result is None else result.continued_rows
    return meta
