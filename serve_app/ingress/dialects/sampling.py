"""Sampling options that LMDeploy's three endpoints share, and the request that they make."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app.errors import InvalidRequest
from serve_app.ingress.guard.errors import refused
from serve_app.sessions import session_name
from serve_app.types import GenerateRequest, OnDivergence

TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
Words = str | list[str]
MAX_CHOICES = 128
_INT64 = 2**63


class SamplingBody(BaseModel):
    """Fields of ``/generate``, chat and completions alike; unknown ones are accepted, as there.

    ``seed``, ``continue_from``, ``on_divergence``, ``tag`` and ``lease_s`` are r3serve's own, see
    `GenerateRequest`. Left out, a filter is off: LMDeploy would take ``top_k=50`` or the
    checkpoint's own.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    session_id: Annotated[int, Field(ge=-1, lt=_INT64)] | None = -1
    stop: Words | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    return_routed_experts: bool | None = False
    repetition_ngram_size: Annotated[int, Field(ge=0)] = 0
    repetition_ngram_threshold: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=-_INT64, lt=2 * _INT64)] | None = None
    continue_from: str | None = None
    on_divergence: OnDivergence | None = None
    tag: str | None = None
    lease_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however many were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check_supported(self) -> None:
        """Raise `InvalidRequest` for what would otherwise be ignored in silence."""
        if self.repetition_ngram_size and self.repetition_ngram_threshold:
            raise InvalidRequest("repetition_ngram_size is not supported: expected 0")

    def request(
        self, input_ids: Sequence[int], max_new_tokens: int, **fields: Any
    ) -> GenerateRequest:
        """Return the engine's request for one prompt."""
        named = self.session_id is not None and self.session_id >= 0
        given = {
            "request_id": session_name(self.session_id) if named else None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "ignore_eos": self.ignore_eos,
            "include_stop_token": self.include_stop_str_in_output,
            "return_routed_experts": self.return_routed_experts,
            "seed": self.seed,
            "continue_from": self.continue_from,
            "on_divergence": self.on_divergence,
            "tag": self.tag,
            "lease_s": self.lease_s,
            **fields,
        }
        try:
            return GenerateRequest(
                input_ids=list(input_ids),
                max_new_tokens=max_new_tokens,
                stop=self.stops,
                **{name: value for name, value in given.items() if value is not None},
            )
        except ValidationError as error:
            raise refused(error) from None
