"""What a batch says of its rows beside their routes: versions, tokens, which were never routed."""

from typing import Any

import numpy as np
import pytest

from serve_app.assemble.ranks import rank_rows
from serve_app.assemble.shares import Share, join, share_out
from serve_app.config import StoreArgs
from serve_app.errors import ModelUnknown, RecordError, RoutesGap
from serve_app.materialize import materialize
from serve_app.observe.masked_rows import masked_rows
from serve_app.records import make_record
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, ModelShape, PackedExperts, RankSlice, RoutedSequence
from tests.distinct_ids import distinct_ids

MODEL = ModelShape(layers=3, top_k=2, num_experts=16)
TOKENS = BatchSpec(on_missing="mask", tracks=("tokens",))


def store() -> MemoryStore:
    return MemoryStore("beside", StoreArgs(backend="memory"))


def put(kept: MemoryStore, rows: int, start: int = 0, **how: Any) -> str:
    parent = how.pop("parent", None)
    record = make_record(distinct_ids((rows, 3, 2), 16), num_experts=16, start=start, **how)
    return kept.put(record, parent=parent)


def versions(batch: PackedExperts) -> list[int]:
    known = [batch.versions[number] if batch.versions else -1 for number in batch.version_of.flat]
    return [v if valid else -1 for v, valid in zip(known, batch.valid.flat, strict=True)]


def test_two_updates_across_three_turns_leave_every_rows_version() -> None:
    kept = store()
    first = put(kept, 3, weight_version=4, tokens=[1, 2, 3])
    second = put(kept, 2, start=3, weight_version=-7, parent=first)
    third = put(kept, 2, start=5, weight_version=9, tokens=[6, 7], parent=second)
    other = put(kept, 2, weight_version=5)
    sequences = [RoutedSequence(third, 8), RoutedSequence(other, 3), RoutedSequence(None, 2)]
    batch = materialize(kept, sequences, TOKENS)
    assert versions(batch) == [4, 4, 4, -7, -7, 9, 9, -1, 5, 5, -1, -1, -1]
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [1, 2, 3, -1, -1, 6, 7, -1, -1, -1, -1, -1, -1]
    assert materialize(kept, [RoutedSequence(third, 7)]).tokens is None


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_ranks_slice_is_of_its_own_rows_however_many_nodes_have_them(layout: Any) -> None:
    kept = store()
    keys = [
        put(kept, rows, weight_version=rows, tokens=np.arange(rows) + 100 * rows)
        for rows in (5, 9, 12)
    ]
    sequences = [RoutedSequence(key, rows + 1) for key, rows in zip(keys, (5, 9, 12), strict=True)]
    seen: list[int] = []
    for cp_rank in range(2):
        rank = RankSlice(seq_multiple=4, cp_size=2, cp_rank=cp_rank)
        spec = BatchSpec(layout=layout, rank=rank, tracks=("tokens",))
        whole = materialize(kept, sequences, spec)
        rows = rank_rows([sequence.length for sequence in sequences], spec)
        shares = share_out(sequences, {"a": [1], "b": [0, 2]}, rows)
        answers = [
            materialize(kept, share.sequences, spec, pieces=share.pieces) for share in shares
        ]
        joined = join(shares, answers, rows, spec, None, np.empty)
        assert isinstance(shares[0], Share)
        assert whole.tokens is not None
        assert joined.tokens is not None
        assert joined.tokens.shape == joined.valid.shape == joined.version_of.shape
        np.testing.assert_array_equal(joined.tokens, whole.tokens)
        assert versions(joined) == versions(whole)
        for token, version in zip(whole.tokens.flat, versions(whole), strict=True):
            assert token == -1 if version == -1 else token // 100 == version
        seen += [int(token) for token in whole.tokens.flat if token >= 0]
    assert sorted(seen) == [token for rows in (5, 9, 12) for token in range(100 * rows, 101 * rows)]


def test_a_rollout_without_routes_is_masked_and_listed() -> None:
    kept = store()
    key = put(kept, 4)
    sequences = [RoutedSequence(None, 3), RoutedSequence(key, 5), RoutedSequence(None, 1, first=2)]
    batch = materialize(kept, sequences, BatchSpec(on_missing="mask"))
    assert batch.valid.tolist() == [False] * 3 + [True] * 4 + [False] * 2
    assert [(gap.index, gap.first, gap.count, gap.reason) for gap in batch.missing] == [
        (0, 0, 3, "NoRoutes"),
        (2, 0, 1, "NoRoutes"),
    ]
    assert masked_rows(batch) == {"NoRoutes": 4}
    with pytest.raises(RoutesGap, match="sequence 0 has no key: expected one, or on_missing"):
        materialize(kept, sequences)
    with pytest.raises(ValueError, match="length must be >= 1"):
        RoutedSequence(None, 0)


def test_a_batch_of_nothing_has_the_models_shape() -> None:
    kept, gone = store(), [RoutedSequence(None, 3), RoutedSequence(None, 2)]
    with pytest.raises(ModelUnknown, match="expected model=ModelShape"):
        materialize(kept, gone, BatchSpec(on_missing="mask"))
    model = ModelShape(layers=3, top_k=2, num_experts=300, moe_layers=(1, 2))
    batch = materialize(kept, gone, BatchSpec(on_missing="mask", model=model, pad="spread"))
    assert (batch.ids.shape, batch.ids.dtype.name) == ((5, 3, 2), "uint16")
    assert (batch.layers, batch.columns, batch.num_experts) == ((1, 2), (0, 1, 2), 300)
    assert not batch.valid.any()
    assert versions(batch) == [-1] * 5
    assert all(len(set(row)) == 2 for row in batch.ids.reshape(-1, 2).tolist())
    with pytest.raises(RoutesGap):
        materialize(kept, gone, BatchSpec(model=model))


@pytest.mark.parametrize(
    "odd", [(0, 2, 16, None), (3, 17, 16, None), (3, 2, 16, (0, 7)), (3, 2, 16, ())]
)
def test_a_shape_that_no_model_has_is_refused(odd: Any) -> None:
    with pytest.raises(ValueError, match="top_k up to num_experts and ascending moe_layers"):
        ModelShape(*odd)


def test_records_of_another_model_than_expected_are_refused() -> None:
    kept = store()
    key = put(kept, 4)
    spec = BatchSpec(model=MODEL)
    assert materialize(kept, [RoutedSequence(key, 4)], spec).valid.all()
    other = BatchSpec(model=ModelShape(layers=3, top_k=2, num_experts=32))
    with pytest.raises(RecordError, match=r"has .* 16, .*, the expected model \(3, 2, 32"):
        materialize(kept, [RoutedSequence(key, 4)], other)


def test_rows_that_nobody_routed_are_counted_in_every_batch() -> None:
    kept, ids = store(), distinct_ids((6, 3, 2), 16)
    ids[2:4] = 0
    key = kept.put(make_record(ids, num_experts=16))
    batch = materialize(kept, [RoutedSequence(key, 7), RoutedSequence(key, 2, first=3)])
    assert batch.valid.tolist() == [True, True, False, False, True, True, False, False, True]
    assert masked_rows(batch) == {"Unrouted": 3}


def test_unknown_tracks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tracks must be some of .*, got \['support'\]"):
        BatchSpec(tracks=("support",))  # type: ignore[arg-type]


def test_rows_that_were_put_as_not_valid_have_a_reason_of_their_own() -> None:
    kept, ids = store(), distinct_ids((6, 3, 2), 16)
    ids[4], valid = 3, np.arange(6) != 1
    key = kept.put(make_record(ids, num_experts=16, valid=valid))
    batch = materialize(kept, [RoutedSequence(key, 7)], TOKENS)
    assert masked_rows(batch) == {"Unrouted": 1, "NotValid": 1}
    cut = materialize(kept, [RoutedSequence(key, 3)], TOKENS)
    assert masked_rows(cut) == {"NotValid": 1}
