"""What crosses the public API: requests, results and batches. No Ray, no HTTP."""

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]
OutputDtype = Literal["uint8", "uint16", "int32", "int64"]
OnMissing = Literal["raise", "mask"]
Where = Literal["auto", "local", "decoder"]
UpdateMode = Literal["abort", "drain"]


class GenerateRequest(BaseModel):
    """One rollout to sample.

    ``temperature=0`` is greedy; ``top_k=0`` and ``top_p=1`` switch those filters off. ``stop``
    strings cut ``text``, never ``output_ids``. ``lease_s=None`` takes the store's default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_ids: Annotated[list[int], Field(min_length=1)]
    request_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop_token: bool = True
    ignore_eos: bool = False
    return_routed_experts: bool = False
    tag: str | None = None
    lease_s: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished rollout.

    ``logprobs`` are those of the sampled tokens before temperature and filters.
    ``routed_experts`` is a key, an array ``[rows, layers, top_k]`` where keys are switched off,
    or None, and then ``routed_experts_error`` says why if it was asked for.
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


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """New tokens of a streaming rollout; ``result`` comes with the last chunk only."""

    request_id: str
    output_ids: list[int]
    logprobs: list[float]
    text: str
    result: GenerateResult | None = None


@dataclass(frozen=True, slots=True)
class RoutedSequence:
    """Where one training sequence's routes are: ``length`` input rows from row ``first`` on.

    The one row after the last captured is not missing (the trainer kept the last token);
    fewer rows than captured is an explicit cut.
    """

    key: str
    length: int
    first: int = 0

    def __post_init__(self) -> None:
        """Refuse lengths that cannot be meant."""
        if self.length < 1 or self.first < 0:
            raise ValueError(
                f"length must be >= 1 and first >= 0, got length={self.length} first={self.first}"
            )


@dataclass(frozen=True, slots=True)
class MissingRows:
    """Rows that were masked: ``count`` rows of sequence ``index``, from its row ``first`` on."""

    index: int
    first: int
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """`ExpertBatch` in numpy: what the decoder answers and the client wraps."""

    ids: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    cu_seqlens: npt.NDArray[np.int32]
    layers: tuple[int, ...]
    num_experts: int
    missing: tuple[MissingRows, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertBatch:
    """Materialized routes of several sequences, packed.

    ``ids`` ``[tokens, layers, top_k]``; ``valid`` bool ``[tokens]``, False = route natively;
    ``cu_seqlens`` int32 ``[sequences + 1]``; ``layers`` the MoE layers' global indices.
    """

    ids: "torch.Tensor"
    valid: "torch.Tensor"
    cu_seqlens: "torch.Tensor"
    layers: tuple[int, ...]
    num_experts: int
    missing: tuple[MissingRows, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightsResult:
    """How one engine replica took new weights."""

    replica: str
    version: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ShardStats:
    """Counters of one shard since it started, and what it holds now (bytes are exact)."""

    shard: str
    live_keys: int
    live_bytes: int
    byte_budget: int
    waiting_puts: int
    puts: int
    gets: int
    released: int
    expired: int
    full: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The application's shards, and the ones that did not answer."""

    shards: tuple[ShardStats, ...]
    unreachable: tuple[str, ...] = field(default=())

    @property
    def live_keys(self) -> int:
        """Keys that read now, over all shards."""
        return sum(shard.live_keys for shard in self.shards)

    @property
    def live_bytes(self) -> int:
        """Bytes held for live keys, over all shards."""
        return sum(shard.live_bytes for shard in self.shards)
