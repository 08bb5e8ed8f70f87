"""What crosses the public API: requests, results and batches. No Ray, no HTTP."""

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]
OutputDtype = Literal["uint8", "uint16", "int32", "int64"]
OnMissing = Literal["raise", "mask"]
Where = Literal["auto", "local", "decoder"]
UpdateMode = Literal["abort", "drain"]
SleepLevel = Literal[1, 2]


class GenerateRequest(BaseModel):
    """One rollout to sample.

    ``temperature=0`` is greedy; ``top_k=0``, ``top_p=1`` and ``min_p=0`` switch those filters
    off. ``repetition_penalty`` divides (of negative logits: multiplies) the logits of tokens in
    prompt and output; ``presence_penalty`` and ``frequency_penalty`` are subtracted once, and
    once an occurrence, for tokens in the output. No stop token is sampled and no stop string
    looked for before ``min_new_tokens``. ``stop`` strings cut ``text``, never ``output_ids``.

    ``continue_from`` is the key of routes that cover the beginning of ``input_ids``: the new
    key reads as the whole sequence, and rows that were covered stay as they were captured.
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


Tail = Literal["last_sequence", "own_sequence", "rank"]


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One trainer rank's part of a batch; the default is the whole batch.

    Applied in this order: each sequence is padded to ``seq_multiple`` rows (2·cp for zigzag,
    tp·2·cp with sequence parallelism); the total to ``total_multiple``, by lengthening the last
    sequence, by one more sequence, or at the end of each context parallel rank's own rows
    (``tail``; ``total_multiple`` is then of the rank's rows); context
    parallel ranks take their chunks, per sequence (``zigzag``, as Megatron) or of the whole
    buffer (``contiguous``); sequence parallel ranks take contiguous shares of that.
    ``layers`` are global layer indices, in the order wanted (pipeline stages, virtual ones too);
    ``dense_layers="drop"`` leaves out the columns of layers without experts.
    """

    seq_multiple: int = 1
    total_multiple: int = 1
    tail: Tail = "own_sequence"
    cp_size: int = 1
    cp_rank: int = 0
    cp: Literal["zigzag", "contiguous"] = "zigzag"
    sp_size: int = 1
    sp_rank: int = 0
    layers: tuple[int, ...] | None = None
    dense_layers: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        """Refuse ranks outside their group and layers named twice or not at all."""
        sizes = (self.seq_multiple, self.total_multiple, self.cp_size, self.sp_size)
        named = self.layers is None or 0 < len(set(self.layers)) == len(self.layers)
        if (
            min(sizes) < 1
            or not 0 <= self.cp_rank < self.cp_size
            or not 0 <= self.sp_rank < self.sp_size
            or self.tail not in ("last_sequence", "own_sequence", "rank")
            or self.cp not in ("zigzag", "contiguous")
            or self.dense_layers not in ("keep", "drop")
            or not named
        ):
            raise ValueError(f"sizes >= 1, 0 <= rank < size, distinct layers expected, got {self}")


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """What a materialized batch looks like.

    ``layout="padded"`` gives ``[sequences, length, layers, top_k]``, right-padded. Padding and
    masked rows are always ``valid=False``; their ids are 0 (``mask``), distinct and evenly
    spread over the experts (``spread``), or random with ``pad_seed`` (``random``, as xtuner
    pads), for trainers that route by the ids alone.
    """

    dtype: OutputDtype | None = None
    on_missing: OnMissing = "raise"
    layout: Literal["packed", "padded"] = "packed"
    rank: RankSlice = RankSlice()
    pad: Literal["mask", "spread", "random"] = "mask"
    pad_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse words that are none of the choices."""
        for name, choices in (
            ("dtype", (None, "uint8", "uint16", "int32", "int64")),
            ("on_missing", ("raise", "mask")),
            ("layout", ("packed", "padded")),
            ("pad", ("mask", "spread", "random")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class MissingRows:
    """Rows that were masked: ``count`` rows of sequence ``index``, from its row ``first`` on."""

    index: int
    first: int
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """`ExpertBatch` in numpy: what the decoder answers and the client wraps.

    ``model`` is what all records of it share: layers, top_k, experts, and the MoE layers.
    """

    ids: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    cu_seqlens: npt.NDArray[np.int32]
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    num_experts: int
    missing: tuple[MissingRows, ...] = ()
    model: tuple[int, int, int, tuple[int, ...]] = (0, 0, 0, ())


@dataclass(frozen=True, slots=True)
class ExpertBatch:
    """Materialized routes of several sequences.

    ``ids`` ``[tokens, layers, top_k]`` (packed) or ``[sequences, length, layers, top_k]``;
    ``valid`` bool, the same without the last two, False = route natively; ``cu_seqlens`` int32
    ``[sequences + 1]``, the global padded boundaries, one more where padding is a sequence of its
    own (every ``tail`` but ``last_sequence``); ``layers`` the MoE layers' global indices,
    ``columns`` the global layer of each of the ids' layers.
    """

    ids: "torch.Tensor"
    valid: "torch.Tensor"
    cu_seqlens: "torch.Tensor"
    layers: tuple[int, ...]
    num_experts: int
    missing: tuple[MissingRows, ...] = ()
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightsResult:
    """How one engine replica took new weights."""

    replica: str
    version: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ShardStats:
    """Counters of one shard since it started, and what it holds now (bytes are exact).

    ``lost`` counts keys of earlier processes that were asked for; ``shared_rows`` the rows that
    children did not store because an ancestor had them; ``oldest_s`` is an age in seconds.
    """

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
    lost: int = 0
    shared_rows: int = 0
    oldest_s: float = 0.0


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
