"""The `RankSlice` of each trainer and mode: how it pads and splits a micro-batch.

    slice = replace(verl(Place(cp_size=2, cp_rank=0, tp_size=4, tp_rank=1)), layers=(0, 1, 2))

Only rows are said here. Layers are the pipeline stage's, see `examples.recipes.stages`.
"""

from dataclasses import dataclass
from math import lcm
from typing import Any

from serve_app.types import RankSlice


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands. ``cp_size`` is the micro-batch's own where it is chosen for each."""

    cp_size: int = 1
    cp_rank: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    sequence_parallel: bool = True

    @property
    def rows(self) -> int:
        """What Megatron aligns to: each rank gets two chunks, and these divide by ``tp``."""
        return self.tp_size * (2 * self.cp_size if self.cp_size > 1 else 1)

    def slice(self, **how: Any) -> RankSlice:
        split = self.sequence_parallel
        return RankSlice(
            cp_size=self.cp_size,
            cp_rank=self.cp_rank,
            sp_size=self.tp_size if split else 1,
            sp_rank=self.tp_rank if split else 0,
            **how,
        )


def verl(place: Place, *, fp8: bool = False, bucket: int = 1) -> RankSlice:
    """Each sequence to `Place.rows`; FP8 pads to 16 too, and the last sequence until 128 divide.

    ``bucket`` is ``pad_to_length_bucket``.
    """
    total = lcm(bucket, place.cp_size) if bucket > 1 else 1
    if not fp8:
        return place.slice(seq_multiple=place.rows, total_multiple=total, tail="last_sequence")
    return place.slice(
        seq_multiple=lcm(16, place.rows),
        total_multiple=lcm(total, 128 * place.rows),
        tail="last_sequence",
    )


def verl_contiguous(place: Place, tokens: list[int], window: int) -> RankSlice:
    """DeepSeek-V4: contiguous shares, and each rank has at least a window's rows."""
    multiple, least = place.cp_size * place.tp_size, place.cp_size * window
    padded = sum(-(-count // multiple) * multiple for count in tokens)
    return place.slice(
        seq_multiple=multiple,
        total_multiple=least if padded < least else 1,
        tail="last_sequence",
        cp="contiguous",
    )


def slime(place: Place, multiplier: int, *, allgather_cp: bool = False) -> RankSlice:
    """slime and miles; ``multiplier`` is ``data_pad_size_multiplier``.

    Sequences are padded for zigzag alone, and with one context parallel rank not at all.
    """
    rows = place.tp_size * multiplier
    if allgather_cp:
        return place.slice(total_multiple=place.cp_size * rows, cp="contiguous")
    each = 2 * place.cp_size if place.cp_size > 1 else 1
    return place.slice(seq_multiple=each, total_multiple=rows, tail="rank")


def skyrl(place: Place, *, fp8: bool = False) -> RankSlice:
    """Each sequence alone is aligned."""
    return place.slice(seq_multiple=lcm(place.rows, 16 * place.cp_size) if fp8 else place.rows)


def skyrl_once(place: Place, *, tokens: int = 1) -> RankSlice:
    """SkyRL with ``packed_segment_layout``: the last sequence takes what all together need.

    ``tokens`` is what FP8 needs: 16·cp in the first version; later 16·cp without and 128·tp·cp
    with tensor parallel ranks, 32·tp·cp for MXFP8.
    """
    return place.slice(
        seq_multiple=place.rows if place.cp_size > 1 else 1,
        total_multiple=lcm(place.rows, tokens),
        tail="last_sequence",
    )


def nemo_rl(place: Place, *, divisor: int = 1, packed_to: int | None = None) -> RankSlice:
    """Each sequence for its split, the last one for the total.

    ``divisor`` is 128 for block-wise FP8 and HybridEP, 32 for MXFP8, 16 for other FP8;
    ``packed_to`` is the length of all packs where there are pipeline stages.
    """
    each = 2 * place.cp_size if place.cp_size > 1 else 1
    each *= place.tp_size if place.sequence_parallel else 1
    total = divisor * each if divisor > 1 else 1
    if packed_to is not None:
        total *= -(-packed_to // total)
    return place.slice(seq_multiple=each, total_multiple=total, tail="last_sequence")


def megatron_buffer(place: Place, rows: int) -> RankSlice:
    """Zigzag over the buffer of ``rows``, whatever sequences are in it."""
    return place.slice(total_multiple=rows, cp="zigzag_buffer")


def fixed_length(place: Place, rows: int) -> RankSlice:
    """Every sequence ``rows`` long (bshd): for ``layout="padded"``."""
    return place.slice(seq_multiple=rows)


def xtuner(place: Place, pack_max_length: int) -> RankSlice:
    """Padding fills the pack; ``place.tp_size`` stands for its sequence parallel ranks."""
    return place.slice(total_multiple=pack_max_length)


def prime_rl(place: Place, multiple: int) -> RankSlice:
    """Padding fills the pack up to ``pad_to_multiple_of``; context parallel ranks take shares."""
    return place.slice(total_multiple=multiple, cp="contiguous")
