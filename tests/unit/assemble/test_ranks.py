"""Rank slices: gathered over all ranks they are the whole, against a reference of a few lines."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.assemble.ranks import RankRows, packed_rows, padded_rows
from serve_app.types import RankSlice

PAD = -1


def rows_of(rank: RankRows, lengths: list[int]) -> list[int]:
    """Global numbers of a rank's rows in the unpadded batch, PAD for padding."""
    starts = np.cumsum([0, *lengths]).tolist()
    rows: list[int] = []
    for piece in rank.pieces:
        if piece.sequence is None:
            rows += [PAD] * piece.count
        else:
            first = starts[piece.sequence] + piece.first
            assert piece.first + piece.count <= lengths[piece.sequence]
            rows += range(first, first + piece.count)
    assert len(rows) == rank.rows
    return rows


def whole(lengths: list[int], seq_multiple: int) -> list[list[int]]:
    """Each padded sequence's rows, by the definition."""
    number, sequences = 0, list[list[int]]()
    for length in lengths:
        rows = list(range(number, number + length))
        number += length
        sequences.append(rows + [PAD] * (-length % seq_multiple))
    return sequences


lengths_of = st.lists(st.integers(1, 20), min_size=1, max_size=5)


@given(
    lengths=lengths_of,
    cp=st.sampled_from([1, 2, 4]),
    sp=st.sampled_from([1, 2]),
    extra=st.sampled_from([1, 3]),
    tail=st.sampled_from(["last_sequence", "own_sequence", "rank"]),
    style=st.sampled_from(["zigzag", "contiguous", "zigzag_buffer"]),
)
def test_all_ranks_together_are_the_whole(
    lengths: list[int], cp: int, sp: int, extra: int, tail: str, style: str
) -> None:
    multiple = 2 * cp * sp * extra
    total = 4 * multiple
    sequences = whole(lengths, multiple)
    surplus = -sum(map(len, sequences)) % total
    if tail == "last_sequence":
        sequences[-1] += [PAD] * surplus
    elif tail == "own_sequence" and surplus:
        sequences.append([PAD] * surplus)
    flat = [row for sequence in sequences for row in sequence]
    for r in range(cp):
        if style == "contiguous" or cp == 1:
            share = len(flat) // cp
            expected = flat[r * share : (r + 1) * share]
        elif style == "zigzag_buffer":
            half = len(flat) // (2 * cp)
            last = len(flat) - r * half
            expected = flat[r * half : (r + 1) * half] + flat[last - half : last]
        else:
            chunks = [np.array_split(np.array(rows), 2 * cp) for rows in sequences]
            expected = np.concatenate([np.r_[c[r], c[2 * cp - 1 - r]] for c in chunks]).tolist()
        boundaries = np.cumsum([0, *map(len, sequences)]).tolist()
        if tail == "rank" and (more := -len(expected) % total):
            expected += [PAD] * more
            boundaries.append(boundaries[-1] + cp * more)
        gathered: list[int] = []
        for s in range(sp):
            slice_ = RankSlice(
                seq_multiple=multiple,
                total_multiple=total,
                tail=tail,  # type: ignore[arg-type]
                cp_size=cp,
                cp_rank=r,
                cp=style,  # type: ignore[arg-type]
                sp_size=sp,
                sp_rank=s,
            )
            rank = packed_rows(lengths, slice_)
            gathered += rows_of(rank, lengths)
            assert rank.boundaries == boundaries
        assert gathered == expected


@given(
    lengths=lengths_of,
    cp=st.sampled_from([1, 2, 4]),
    sp=st.sampled_from([1, 2]),
    style=st.sampled_from(["zigzag", "contiguous", "zigzag_buffer"]),
)
def test_the_padded_layout_right_pads_each_sequence(
    lengths: list[int], cp: int, sp: int, style: str
) -> None:
    multiple = 2 * cp * sp
    longest = -(-max(lengths) // multiple) * multiple
    sequences = [rows + [PAD] * (longest - len(rows)) for rows in whole(lengths, 1)]
    for r, s in itertools.product(range(cp), range(sp)):
        rank = RankSlice(multiple, cp_size=cp, cp_rank=r, cp=style, sp_size=sp, sp_rank=s)  # type: ignore[arg-type]
        expected: list[int] = []
        for rows in sequences:
            chunks = np.array_split(np.array(rows), 2 * cp)
            zigzag = np.r_[chunks[r], chunks[2 * cp - 1 - r]] if cp > 1 else np.array(rows)
            mine = np.array_split(np.array(rows), cp)[r] if style == "contiguous" else zigzag
            expected += np.array_split(mine, sp)[s].tolist()
        assert rows_of(padded_rows(lengths, rank), lengths) == expected


def test_rows_are_numbered_so_that_padding_is_one_stretch() -> None:
    """Two sequences of 3 and 6 rows, padded to 4 and 8, and 4 more: each row's number."""
    rank = RankSlice(seq_multiple=4, total_multiple=16)
    pieces = packed_rows([3, 6], rank).pieces
    numbers = [[*range(piece.at, piece.at + piece.count)] for piece in pieces]
    assert numbers == [[-3, -2, -1], [0], [-7, -6, -5, -4, -3, -2], [1, 2], [3, 4, 5, 6]]


@given(
    lengths=lengths_of,
    cp=st.sampled_from([1, 2]),
    sp=st.sampled_from([1, 2]),
    tail=st.sampled_from(["last_sequence", "own_sequence", "rank"]),
    style=st.sampled_from(["zigzag", "contiguous", "zigzag_buffer"]),
)
def test_a_row_has_the_same_number_whichever_rank_has_it(
    lengths: list[int], cp: int, sp: int, tail: Any, style: Any
) -> None:
    multiple = 2 * cp * sp
    padding: list[int] = []
    for r, s in itertools.product(range(cp), range(sp)):
        rank = RankSlice(multiple, 4 * multiple, tail, cp, r, style, sp, s)
        for piece in packed_rows(lengths, rank).pieces:
            if piece.sequence is None:
                padding += range(piece.at, piece.at + piece.count)
            else:
                assert piece.at == piece.first - lengths[piece.sequence] - piece.sequence
    assert sorted(padding) == [*range(len(padding))]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (RankSlice(cp_size=2), r"5 rows of a padded sequence do not divide by 2 \* cp_size = 4"),
        (RankSlice(cp_size=2, cp="contiguous"), "5 rows of the padded batch do not divide by cp"),
        (
            RankSlice(cp_size=2, cp="zigzag_buffer"),
            r"5 rows of the padded batch .* 2 \* cp_size = 4",
        ),
        (RankSlice(sp_size=2), "5 rows of the rank do not divide by sp_size = 2"),
    ],
)
def test_an_uneven_split_is_refused(rank: RankSlice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_rows([5], rank)


def test_the_padded_layout_has_no_total_to_pad() -> None:
    with pytest.raises(ValueError, match="total_multiple=1, got RankSlice"):
        padded_rows([4, 4], RankSlice(total_multiple=8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"cp_size": 2, "cp_rank": 2},
        {"sp_rank": 1},
        {"seq_multiple": 0},
        {"tail": "front"},
        {"cp": "ring"},
        {"layers": (1, 1)},
        {"dense_layers": "hide"},
    ],
)
def test_slices_that_cannot_be_meant(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="RankSlice"):
        RankSlice(**wrong)  # type: ignore[arg-type]
