"""Which rows a trainer wants of which keys, and the batch that it gets."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

OutputDtype = Literal["uint8", "uint16", "int32", "int64"]
OnMissing = Literal["raise", "mask"]
Where = Literal["auto", "local", "decoder"]
BatchTrack = Literal["tokens"]


@dataclass(frozen=True, slots=True)
class RoutedSequence:
    """Where one training sequence's routes are: ``length`` input rows from row ``first`` on.

    The one row after the last captured is not missing (the trainer kept the last token);
    fewer rows than captured is an explicit cut. ``key=None`` stands for a rollout without routes:
    all of its rows are missing.
    """

    key: str | None
    length: int
    first: int = 0

    def __post_init__(self) -> None:
        """Refuse lengths that cannot be meant."""
        if self.length < 1 or self.first < 0:
            raise ValueError(
                f"length must be >= 1 and first >= 0, got length={self.length} first={self.first}"
            )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a batch needs to know of the model where no record says it; None means every layer."""

    layers: int
    top_k: int
    num_experts: int
    moe_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what no model is like."""
        moe = self.moe
        fits = self.layers >= 1 and 1 <= self.top_k <= self.num_experts and len(moe) > 0
        if not fits or list(moe) != sorted(set(moe)) or moe[0] < 0 or moe[-1] >= self.layers:
            raise ValueError(
                "expected layers >= 1, top_k up to num_experts and ascending moe_layers below"
                f" layers, got {self}"
            )

    @property
    def moe(self) -> tuple[int, ...]:
        """Global indices of the MoE layers."""
        return tuple(range(self.layers)) if self.moe_layers is None else self.moe_layers


Tail = Literal["last_sequence", "own_sequence", "rank"]
ContextParallel = Literal["zigzag", "contiguous", "zigzag_buffer"]
Pad = Literal["mask", "spread", "random", "random_with_repetition"]


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One trainer rank's part of a batch; the default is the whole batch.

    Applied in this order: each sequence is padded to ``seq_multiple`` rows (2·cp for zigzag,
    tp·2·cp with sequence parallelism); the total to ``total_multiple``, by lengthening the last
    sequence, by one more sequence, or at the end of each context parallel rank's own rows
    (``tail``; ``total_multiple`` is then of the rank's rows); context
    parallel ranks take their chunks, per sequence (``zigzag``, as Megatron) or of the whole
    buffer (``contiguous``, or ``zigzag_buffer``: zigzag as if it were one sequence); sequence
    parallel ranks take contiguous shares of that.
    ``layers`` are global layer indices, in the order wanted (pipeline stages, virtual ones too;
    ``()``, for a stage without any, gives ``[tokens, 0, top_k]``);
    ``dense_layers="drop"`` leaves out the columns of layers without experts.
    """

    seq_multiple: int = 1
    total_multiple: int = 1
    tail: Tail = "own_sequence"
    cp_size: int = 1
    cp_rank: int = 0
    cp: ContextParallel = "zigzag"
    sp_size: int = 1
    sp_rank: int = 0
    layers: tuple[int, ...] | None = None
    dense_layers: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        """Refuse ranks outside their group and layers named twice."""
        sizes = (self.seq_multiple, self.total_multiple, self.cp_size, self.sp_size)
        named = self.layers is None or len(set(self.layers)) == len(self.layers)
        if (
            min(sizes) < 1
            or not 0 <= self.cp_rank < self.cp_size
            or not 0 <= self.sp_rank < self.sp_size
            or self.tail not in ("last_sequence", "own_sequence", "rank")
            or self.cp not in ("zigzag", "contiguous", "zigzag_buffer")
            or self.dense_layers not in ("keep", "drop")
            or not named
        ):
            raise ValueError(f"sizes >= 1, 0 <= rank < size, distinct layers expected, got {self}")


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """What a materialized batch looks like.

    ``layout="padded"`` gives ``[sequences, length, layers, top_k]``, right-padded. Padding and
    masked rows are always ``valid=False``; their ids are 0 (``mask``) or, for trainers that route
    by the ids alone: dealt out, so that a row's are distinct and every contiguous share of the
    experts gets as many, in another order in each layer (``spread``; ``pad_seed`` rows were dealt
    before); the same in orders drawn from ``pad_seed`` (``random``); or each id drawn from it by
    itself, the same one twice in a row too (``random_with_repetition``, as xtuner pads).
    """

    dtype: OutputDtype | None = None
    on_missing: OnMissing = "raise"
    layout: Literal["packed", "padded"] = "packed"
    rank: RankSlice = RankSlice()
    pad: Pad = "mask"
    pad_seed: int = 0
    tracks: tuple[BatchTrack, ...] = ()
    model: ModelShape | None = None

    def __post_init__(self) -> None:
        """Refuse words that are none of the choices."""
        for name, choices in (
            ("dtype", (None, "uint8", "uint16", "int32", "int64")),
            ("on_missing", ("raise", "mask")),
            ("layout", ("packed", "padded")),
            ("pad", ("mask", "spread", "random", "random_with_repetition")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if unknown := set(self.tracks) - {"tokens"}:
            raise ValueError(f"tracks must be some of ('tokens',), got {sorted(unknown)}")


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
    ``version_of`` has the number of each row's version in ``versions``; ``unrouted`` counts rows
    that were put as no router's choice, ``not_valid`` others that were put as ``valid=False``.
    """

    ids: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]
    cu_seqlens: npt.NDArray[np.int32]
    layers: tuple[int, ...]
    columns: tuple[int, ...]
    num_experts: int
    missing: tuple[MissingRows, ...] = ()
    model: tuple[int, int, int, tuple[int, ...]] = (0, 0, 0, ())
    versions: tuple[int, ...] = ()
    version_of: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, np.uint8))
    tokens: npt.NDArray[np.int32] | None = None
    unrouted: int = 0
    not_valid: int = 0


@dataclass(frozen=True, slots=True)
class ExpertBatch:
    """Materialized routes of several sequences.

    ``ids`` ``[tokens, layers, top_k]`` (packed) or ``[sequences, length, layers, top_k]``;
    ``valid`` bool, the same without the last two, False = route natively; ``cu_seqlens`` int32
    ``[sequences + 1]``, the global padded boundaries, one more where padding is a sequence of its
    own (every ``tail`` but ``last_sequence``); ``layers`` the MoE layers' global indices,
    ``columns`` the global layer of each of the ids' layers; ``tokens`` int32, shaped as ``valid``,
    -1 where unknown, None unless they were asked for; ``versions`` and ``version_of`` are what
    ``weight_version`` is made of.
    """

    ids: "torch.Tensor"
    valid: "torch.Tensor"
    cu_seqlens: "torch.Tensor"
    layers: tuple[int, ...]
    num_experts: int
    missing: tuple[MissingRows, ...] = ()
    columns: tuple[int, ...] = ()
    tokens: "torch.Tensor | None" = None
    versions: tuple[int, ...] = ()
    version_of: "torch.Tensor | None" = None

    @property
    def weight_version(self) -> "torch.Tensor":
        """The version of the weights that chose each row's experts, -1 where not valid.

        int64, shaped as ``valid``.
        """
        import torch

        known = torch.tensor(self.versions or (-1,), dtype=torch.int64)
        numbers = torch.zeros_like(self.valid) if self.version_of is None else self.version_of
        return torch.where(self.valid, known[numbers.long()], -1)
