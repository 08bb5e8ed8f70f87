"""Columns beside the routes: what is accepted, how they are cut, what seals them."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import RecordError
from serve_app.records import Track, hash_tokens, make_record, new_part_of, part_of
from tests.distinct_ids import distinct_ids

IDS = distinct_ids((6, 2, 2), 8)
RAGGED = Track(np.arange(7, dtype=np.int32), np.array([0, 0, 3, 3, 5, 7, 7]))


def record(**tracks: Any) -> Any:
    made: Any = make_record(IDS, num_experts=8, tokens=[5, 6, 7, 8, 9, 10], tracks=tracks)
    return made


def test_a_record_has_its_tokens_and_says_how_much_it_takes() -> None:
    made = record()
    assert made.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert made.tokens.dtype == np.int32
    assert made.meta.token_hash == hash_tokens([5, 6, 7, 8, 9, 10])
    assert (made.meta.ids_nbytes, made.meta.nbytes) == (24, 24 + 6 * 4)
    assert make_record(IDS, num_experts=8).tokens is None
    assert make_record(IDS, num_experts=8).meta.token_hash is None
    assert pickle.loads(pickle.dumps(made)).meta == made.meta


def test_a_dense_track_a_layer_is_a_declaration() -> None:
    indexer = np.arange(6 * 2 * 5, dtype=np.uint16).reshape(6, 2, 5)
    made = record(indexer=indexer, score=np.zeros(6, np.float64), support=RAGGED)
    assert [track.name for track in made.meta.tracks] == ["tokens", "indexer", "score", "support"]
    assert made.meta.size_of("indexer") == 6 * 2 * 5 * 2
    assert made.meta.size_of("support") == 7 * 8 + 7 * 4
    assert made.meta.size_of("nothing") == 0
    part: Any = part_of(made, 1, 4)
    np.testing.assert_array_equal(part.tracks["indexer"].values, indexer[1:4])
    assert part.tokens.tolist() == [6, 7, 8]
    support = part.tracks["support"]
    assert support.values.tolist() == [0, 1, 2, 3, 4]
    assert support.offsets is not None
    assert support.offsets.tolist() == [0, 3, 3, 5]
    part.meta.verify(part.ids, dict(part.tracks))
    rest: Any = new_part_of(made, 4)
    assert rest.tokens.tolist() == [9, 10]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_any_part_of_a_ragged_track_survives_its_buffer(
    counts: list[int], cut: tuple[int, int]
) -> None:
    offsets = np.cumsum([0, *counts])
    track = Track(np.arange(offsets[-1] * 2, dtype=np.int32).reshape(-1, 2), offsets)
    begin, end = sorted(min(at, len(counts)) for at in cut)
    part = track.part(begin, end)
    meta = part.meta("support")
    assert meta.nbytes(part.rows) == part.buffer().nbytes
    back = meta.over(part.buffer(), part.rows)
    assert back.offsets is not None
    for row in range(begin, end):
        mine = back.values[back.offsets[row - begin] : back.offsets[row - begin + 1]]
        np.testing.assert_array_equal(mine, track.values[offsets[row] : offsets[row + 1]])


@pytest.mark.parametrize(
    ("tracks", "says"),
    [
        ({"Support": np.zeros(6)}, "track's name in lower case, .* got 'Support'"),
        ({"routes": np.zeros(6)}, "not 'routes', got 'routes'"),
        ({"score": np.zeros(5)}, "track 'score': expected 6 rows, got 5"),
        (
            {"score": np.zeros(6, complex)},
            r"track 'score': expected \[rows, ...\] of .* complex128",
        ),
        ({"score": np.zeros((6, 1, 1, 1, 1))}, "up to 4 dimensions"),
        ({"score": Track(np.zeros(3), np.array([0, 1, 2, 3]))}, "expected 6 rows, got 3"),
        ({"score": Track(np.zeros(3), np.array([0, 2, 1, 3, 3, 3, 3]))}, "offsets that ascend"),
        ({"score": Track(np.zeros(3), np.array([0, 1, 1, 1, 1, 1, 2]))}, "ascend from 0 to 3"),
        ({"tokens": np.zeros(6, int)}, "expected tokens once"),
        ({f"t{n}": np.zeros(6) for n in range(20)}, "at most 16 tracks, got 21"),
    ],
)
def test_bad_tracks_are_named(tracks: dict[str, Any], says: str) -> None:
    with pytest.raises(RecordError, match=says):
        record(**tracks)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2], "6 rows need 6 token ids, got 2"),
        ([1.5] * 6, r"token ids \[rows\], got float64\[6\]"),
        ([[1]] * 6, r"got int64\[6, 1\]"),
        ([0, 1, 2, 3, 4, 2**31], r"in \[0, 2\*\*31\), got 2147483648"),
        ([0, 1, 2, 3, 4, -2], "got -2"),
    ],
)
def test_bad_tokens_are_named(tokens: Any, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        make_record(IDS, num_experts=8, tokens=tokens)


def test_a_cut_header_promises_nothing_that_it_cannot_know() -> None:
    made = record()
    head = made.first(4)
    assert head.tokens is not None
    assert head.tokens.tolist() == [5, 6, 7, 8]
    assert (head.meta.rows, head.meta.token_hash) == (4, None)
    assert made.first(6) is made
