"""What LMDeploy's clients send to ``/generate`` and read back."""

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from serve_app.types import FinishReason, GenerateRequest, GenerateResult


class GenerateBody(BaseModel):
    """LMDeploy's ``/generate`` request; fields it does not know are accepted, as there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    input_ids: Annotated[list[int], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 128
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    return_logprob: bool = False
    return_routed_experts: bool = False

    def to_request(self) -> GenerateRequest:
        """Translate into r3serve's own request."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerateRequest(
            input_ids=self.input_ids,
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            include_stop_token=self.include_stop_str_in_output,
            return_routed_experts=self.return_routed_experts,
        )


class FinishReasonBody(BaseModel):
    """Why a rollout ended."""

    type: FinishReason


class MetaInfo(BaseModel):
    """Everything about an answer but its text and tokens.

    ``routed_experts`` is a key, a nested list ``[rows][layers][top_k]``, or null.
    """

    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReasonBody
    output_token_logprobs: list[tuple[float, int]] | None = None
    routed_experts: str | list[Any] | None = None
    routed_experts_error: str | None = None
    weight_version: int


class GenerateAnswer(BaseModel):
    """LMDeploy's ``/generate`` answer."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo

    @classmethod
    def of(cls, result: GenerateResult, logprobs: bool) -> "GenerateAnswer":
        """Translate r3serve's own result."""
        routes = result.routed_experts
        pairs = list(zip(result.logprobs, result.output_ids, strict=True))
        return cls(
            text=result.text,
            output_ids=result.output_ids,
            meta_info=MetaInfo(
                prompt_tokens=result.prompt_tokens,
                completion_tokens=len(result.output_ids),
                finish_reason=FinishReasonBody(type=result.finish_reason),
                output_token_logprobs=pairs if logprobs else None,
                routed_experts=routes.tolist() if isinstance(routes, np.ndarray) else routes,
                routed_experts_error=result.routed_experts_error,
                weight_version=result.weight_version,
            ),
        )


class ErrorBody(BaseModel):
    """LMDeploy's error answer."""

    message: str
    type: str
    code: int
    param: str | None = None
    object: str = "error"
