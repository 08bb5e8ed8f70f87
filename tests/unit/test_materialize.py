"""Keys to a packed tensor, against a reference of a few lines."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import StoreArgs
from serve_app.errors import KeyReleased, RecordError, RoutesGap, RoutesLost, UnknownKey
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.keys import Key
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, OutputDtype, RankSlice, RoutedSequence
from tests.distinct_ids import distinct_ids


def store() -> MemoryStore:
    return MemoryStore("unit", StoreArgs(backend="memory"))


def routes(rows: int, experts: int = 16, seed: int = 0) -> np.ndarray[Any, Any]:
    return distinct_ids((rows, 3, 2), experts, seed)


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int]:
    """Segments (start, rows) in the order captured, and the window a trainer asks for."""
    segments, stop = list[tuple[int, int]](), 0
    for _ in range(draw(st.integers(1, 4))):
        start = max(0, stop + draw(st.integers(-3, 2)))
        rows = draw(st.integers(1, 6))
        segments.append((start, rows))
        stop = max(stop, start + rows)
    return segments, draw(st.integers(0, 5)), draw(st.integers(1, stop + 2))


@given(
    many=st.lists(trajectories(), min_size=1, max_size=4),
    experts=st.sampled_from([16, 255, 256, 257, 65_535]),
    dtype=st.sampled_from([None, "uint16", "int32", "int64"]),
)
def test_any_split_equals_the_naive_reference(
    many: list[tuple[list[tuple[int, int]], int, int]], experts: int, dtype: OutputDtype | None
) -> None:
    kept, sequences, expected, valid = store(), list[RoutedSequence](), [], list[bool]()
    for index, (segments, first, length) in enumerate(many):
        truth: dict[int, Any] = {}
        key = None
        for part, (start, rows) in enumerate(segments):
            ids = routes(rows, experts, seed=10 * index + part)
            key = kept.put(make_record(ids, num_experts=experts, start=start), parent=key)
            for row in range(rows):
                truth.setdefault(start + row, ids[row])
        assert key is not None
        sequences.append(RoutedSequence(key, length, first))
        for row in range(first, first + length):
            expected.append(truth.get(row, np.zeros((3, 2), int)))
            valid.append(row in truth)
    packed = materialize(kept, sequences, BatchSpec(dtype=dtype, on_missing="mask"))
    np.testing.assert_array_equal(packed.ids, np.stack(expected))
    np.testing.assert_array_equal(packed.valid, valid)
    assert packed.ids.dtype == np.dtype(dtype or ("uint8" if experts <= 256 else "uint16"))
    lengths = np.diff(packed.cu_seqlens).tolist()
    assert lengths == [sequence.length for sequence in sequences]
    assert packed.cu_seqlens.dtype == np.int32


def test_the_row_after_the_last_captured_is_no_gap() -> None:
    kept = store()
    key = kept.put(make_record(routes(5), num_experts=16))
    packed = materialize(kept, [RoutedSequence(key, 6), RoutedSequence(key, 3)])
    assert packed.valid.tolist() == [True] * 5 + [False] + [True] * 3
    assert packed.missing == ()
    with pytest.raises(RoutesGap, match="rows 5 to 6"):
        materialize(kept, [RoutedSequence(key, 7)])


def test_a_gap_raises_or_is_masked_and_listed() -> None:
    kept = store()
    parent = kept.put(make_record(routes(2), num_experts=16))
    child = kept.put(make_record(routes(2), num_experts=16, start=4), parent=parent)
    with pytest.raises(RoutesGap, match="rows 2 to 3 were never captured"):
        materialize(kept, [RoutedSequence(child, 6)])
    packed = materialize(kept, [RoutedSequence(child, 6)], BatchSpec(on_missing="mask"))
    assert packed.valid.tolist() == [True, True, False, False, True, True]
    assert [(gap.first, gap.count, gap.reason) for gap in packed.missing] == [(2, 2, "RoutesGap")]


def test_lost_keys_may_be_masked_unknown_and_released_ones_never() -> None:
    kept = store()
    good, gone = (kept.put(make_record(routes(2), num_experts=16)) for _ in range(2))
    lost = Key("unit", "0000000000", 7, 0).sign(b"memory")
    with pytest.raises(RoutesLost):
        materialize(kept, [RoutedSequence(lost, 2)])
    both = [RoutedSequence(lost, 2), RoutedSequence(good, 2)]
    packed = materialize(kept, both, BatchSpec(on_missing="mask"))
    assert packed.valid.tolist() == [False, False, True, True]
    assert packed.missing[0].reason == "RoutesLost"
    with pytest.raises(RoutesLost, match="not even their shape"):
        materialize(kept, [RoutedSequence(lost, 2)], BatchSpec(on_missing="mask"))
    kept.release([gone])
    with pytest.raises(KeyReleased):
        materialize(kept, [RoutedSequence(gone, 2)], BatchSpec(on_missing="mask"))
    with pytest.raises(UnknownKey):
        materialize(kept, [RoutedSequence("made up", 2)], BatchSpec(on_missing="mask"))


def test_rows_recorded_as_invalid_stay_invalid() -> None:
    kept = store()
    valid = np.array([True, False, True])
    key = kept.put(make_record(routes(3), num_experts=16, valid=valid))
    packed = materialize(kept, [RoutedSequence(key, 3), RoutedSequence(key, 2, first=1)])
    assert packed.valid.tolist() == [True, False, True, False, True]


def test_records_of_two_models_do_not_mix() -> None:
    kept = store()
    one = kept.put(make_record(routes(2), num_experts=16))
    other = kept.put(make_record(routes(2), num_experts=32))
    with pytest.raises(RecordError, match=r"\(3, 2, 32"):
        materialize(kept, [RoutedSequence(one, 2), RoutedSequence(other, 2)])


def test_out_is_filled_and_must_fit() -> None:
    kept = store()
    key = kept.put(make_record(routes(4), num_experts=16))
    out = np.empty((4, 3, 2), np.int64)
    packed = materialize(kept, [RoutedSequence(key, 4)], BatchSpec(dtype="int64"), out)
    assert packed.ids is out
    np.testing.assert_array_equal(out, routes(4))
    with pytest.raises(ValueError, match=r"out must be a writable uint8\[4, 3, 2\], got int64"):
        materialize(kept, [RoutedSequence(key, 4)], out=out)


def test_a_dtype_too_narrow_is_refused_not_wrapped() -> None:
    kept = store()
    key = kept.put(make_record(routes(4, 300), num_experts=300))
    with pytest.raises(RecordError, match="uint8 cannot hold every id stored as uint16"):
        materialize(kept, [RoutedSequence(key, 4)], BatchSpec(dtype="uint8"))


@pytest.mark.parametrize(("length", "first"), [(0, 0), (-1, 0), (1, -1)])
def test_sequences_that_cannot_be_meant(length: int, first: int) -> None:
    with pytest.raises(ValueError, match="length"):
        RoutedSequence("key", length, first)


def test_nothing_to_materialize_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        materialize(store(), [])


def two_sequences() -> tuple[MemoryStore, list[RoutedSequence]]:
    kept = store()
    first = kept.put(make_record(routes(7, seed=1), num_experts=16))
    turn = kept.put(make_record(routes(4, seed=2), num_experts=16, start=7), parent=first)
    other = kept.put(make_record(routes(5, seed=3), num_experts=16))
    return kept, [RoutedSequence(turn, 12), RoutedSequence(other, 4, first=1)]


@given(
    cp=st.sampled_from([1, 2]),
    layers=st.sampled_from([None, (0, 1), (2, 0), (1,)]),
    tail=st.sampled_from(["last_sequence", "own_sequence"]),
    style=st.sampled_from(["zigzag", "contiguous"]),
    dtype=st.sampled_from([None, "int64"]),
)
def test_rank_slices_are_cut_out_of_the_whole_padded_batch(
    cp: int, layers: tuple[int, ...] | None, tail: Any, style: Any, dtype: OutputDtype | None
) -> None:
    kept, sequences = two_sequences()
    sizes = {"seq_multiple": 4, "total_multiple": 24, "tail": tail}
    whole = materialize(kept, sequences, BatchSpec(rank=RankSlice(**sizes)))
    for r in range(cp):
        rank = RankSlice(**sizes, cp_size=cp, cp_rank=r, cp=style, layers=layers)
        part = materialize(kept, sequences, BatchSpec(dtype=dtype, rank=rank))
        rows = np.arange(24)
        if cp > 1 and style == "contiguous":
            rows = np.split(rows, cp)[r]
        elif cp > 1:
            chunks = [np.array_split(s, 2 * cp) for s in np.split(rows, whole.cu_seqlens[1:-1])]
            rows = np.concatenate([np.r_[c[r], c[2 * cp - 1 - r]] for c in chunks])
        columns = list(layers or (0, 1, 2))
        np.testing.assert_array_equal(part.ids, whole.ids[rows][:, columns])
        np.testing.assert_array_equal(part.valid, whole.valid[rows])
        assert part.columns == tuple(columns)
        np.testing.assert_array_equal(part.cu_seqlens, whole.cu_seqlens)


def test_the_padded_layout() -> None:
    kept, sequences = two_sequences()
    packed = materialize(kept, sequences)
    padded = materialize(kept, sequences, BatchSpec(layout="padded"))
    assert padded.ids.shape == (2, 12, 3, 2)
    np.testing.assert_array_equal(padded.ids[0], packed.ids[:12])
    np.testing.assert_array_equal(padded.ids[1, :4], packed.ids[12:])
    assert padded.valid.sum(1).tolist() == [11, 4]
    assert padded.ids[1, 4:].max() == 0


def test_dense_layers_can_be_dropped_and_unknown_ones_are_refused() -> None:
    kept = store()
    key = kept.put(make_record(routes(4), num_experts=16, moe_layers=(0, 2)))
    dropped = materialize(
        kept, [RoutedSequence(key, 4)], BatchSpec(rank=RankSlice(dense_layers="drop"))
    )
    np.testing.assert_array_equal(dropped.ids, routes(4)[:, [0, 2]])
    assert dropped.columns == dropped.layers == (0, 2)
    with pytest.raises(ValueError, match=r"layers must be in \[0, 3\), got \[3\]"):
        materialize(kept, [RoutedSequence(key, 4)], BatchSpec(rank=RankSlice(layers=(0, 3))))


@pytest.mark.parametrize("pad", ["mask", "spread", "random"])
def test_padding_is_never_valid_whatever_its_ids(pad: Any) -> None:
    kept, sequences = two_sequences()
    spec = BatchSpec(pad=pad, pad_seed=3, rank=RankSlice(total_multiple=32))
    packed = materialize(kept, sequences, spec)
    assert packed.valid.tolist() == [True] * 11 + [False] + [True] * 4 + [False] * 16
    padding = packed.ids[16:]
    assert padding.max() < 16
    if pad == "spread":
        assert (padding[..., 0] != padding[..., 1]).all()
        assert len(np.unique(padding)) == 16
    np.testing.assert_array_equal(packed.ids, materialize(kept, sequences, spec).ids)
