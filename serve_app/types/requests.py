"""What is asked of an engine, and what it answers."""

import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

FinishReason = Literal["stop", "length", "abort", "error"]
UpdateMode = Literal["abort", "drain"]
SleepLevel = Literal[1, 2]
OnDivergence = Literal["raise", "prefix"]


class GenerateRequest(BaseModel):
    """One rollout to sample.

    ``temperature=0`` is greedy; ``top_k=0``, ``top_p=1`` and ``min_p=0`` switch those filters
    off. ``repetition_penalty`` divides (of negative logits: multiplies) the logits of tokens in
    prompt and output; ``presence_penalty`` and ``frequency_penalty`` are subtracted once, and
    once an occurrence, for tokens in the output. No stop token is sampled and no stop string
    looked for before ``min_new_tokens``. ``stop`` strings cut ``text``, never ``output_ids``.

    ``continue_from`` is the key of routes that cover the beginning of ``input_ids``: the new
    key reads as the whole sequence, and rows that were covered stay as they were captured. Where
    ``input_ids`` part from the tokens that those were captured on, `PrefixMismatch` says so, or,
    with ``on_divergence="prefix"``, the rows before are taken over and the rest is captured anew.
    ``lease_s=None`` takes the store's default. Requests of one ``session`` go to the same engine
    replica while it has room, where a prefix cache has what they begin with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_ids: Annotated[list[int], Field(min_length=1)]
    request_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    logit_bias: dict[int, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop_token: bool = True
    ignore_eos: bool = False
    return_routed_experts: bool = False
    continue_from: str | None = None
    on_divergence: OnDivergence = "raise"
    tag: str | None = None
    lease_s: Annotated[float, Field(gt=0)] | None = None
    session: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"expected min_new_tokens up to max_new_tokens {self.max_new_tokens},"
                f" got {self.min_new_tokens}"
            )
        if self.continue_from is not None and not self.return_routed_experts:
            raise ValueError("continue_from continues routes: set return_routed_experts too")
        return self

    def member(self, index: int) -> "GenerateRequest":
        """Return the request of a group's member: its own id, and seed if the group has one."""
        seed = None if self.seed is None else self.seed + index
        return self.model_copy(update={"request_id": f"{self.request_id}-{index}", "seed": seed})


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished rollout.

    ``logprobs`` are those of the sampled tokens before temperature and filters.
    ``routed_experts`` is a key, an array ``[rows, layers, top_k]`` where keys are switched off,
    or None, and then ``routed_experts_error`` says why if it was asked for. ``continued_rows`` of
    the key's are those of ``continue_from``.
    """

    request_id: str
    output_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    weight_version: int
    routed_experts: str | npt.NDArray[Any] | None = None
    num_routed_tokens: int = 0
    error: str | None = None
    routed_experts_error: str | None = None
    continued_rows: int = 0


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """New tokens of a streaming rollout; ``result`` comes with the last chunk only."""

    request_id: str
    output_ids: list[int]
    logprobs: list[float]
    text: str
    result: GenerateResult | None = None
