"""What chat and completions have in common: OpenAI's words."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field

from serve_app.errors import InvalidRequest
from serve_app.ingress.dialects.sampling import MAX_CHOICES, SamplingBody
from serve_app.ingress.edge.edge import Ingress
from serve_app.ingress.guard.errors import UnknownModel
from serve_app.types import GenerateRequest


class StreamOptions(BaseModel):
    """What a stream says at its end."""

    include_usage: bool | None = False


class OpenAIBody(SamplingBody):
    """Fields of OpenAI's two endpoints, and LMDeploy's additions to both."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with how many tokens were used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_model(self, edge: Ingress) -> None:
        """Raise `UnknownModel` for a model that is not served here."""
        if self.model not in edge.model_names:
            raise UnknownModel(f"The model {self.model[:200]!r} does not exist.")

    async def sampled(self, edge: Ingress, ids: Sequence[int], **fields: Any) -> GenerateRequest:
        """Return the engine's request for one prompt; without a limit it may fill the context."""
        most = self.max_completion_tokens or self.max_tokens
        room = (await edge.info()).context_length - len(ids)
        request = self.request(
            ids,
            most or max(1, room),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_token_bias(self.logit_bias) or None,
            **fields,
        )
        await edge.check_request(request)
        return request

    @property
    def choices(self) -> int:
        """How many rollouts of each prompt."""
        if (self.n or 1) > 1 and self.session_id is not None and self.session_id >= 0:
            raise InvalidRequest("n > 1 cannot be used with an explicit session_id.")
        return self.n or 1


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer and event of one request says about itself."""

    prefix: str
    object: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        """Return the body around some choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


class UsageBody(BaseModel):
    """How many tokens a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


def without_nulls(choice: dict[str, Any]) -> dict[str, Any]:
    """Return an event's choice as LMDeploy sends it: fields that are null are left out."""
    return {name: value for name, value in choice.items() if value is not None}


def _token_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError:
        raise InvalidRequest("logit_bias: expected token ids as keys") from None
