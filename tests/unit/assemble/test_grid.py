"""Everything at once, against a reference of a few lines: any split, layout and rank grid."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.assemble.ranks import rank_rows
from serve_app.assemble.shares import Share, join, share_out
from serve_app.config import StoreArgs
from serve_app.errors import RecordError, RoutesGap
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.keys import Key
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, PackedExperts, RankSlice, RoutedSequence
from tests.distinct_ids import distinct_ids

LAYERS, TOP_K = 5, 2
EXPERTS = (16, 255, 256, 257, 65_535)
Ids = np.ndarray[Any, Any]


@dataclass
class World:
    """A store, what a trainer asks for, and what is true: ids by (sequence, row)."""

    store: MemoryStore
    sequences: list[RoutedSequence]
    truth: list[dict[int, Ids]]
    experts: int
    moe: tuple[int, ...]


def routes(rows: int, layers: int, experts: int = 16, seed: int = 0) -> Ids:
    return distinct_ids((rows, layers, TOP_K), experts, seed)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw sequences in parts: parents, turns and resumes that overlap or leave a gap."""
    store = MemoryStore("grid", StoreArgs(backend="memory"))
    experts = draw(st.sampled_from(EXPERTS))
    moe = draw(st.sampled_from([(0, 1, 2, 3, 4), (1, 2, 4), (3,)]))
    world = World(store, [], [], experts, moe)
    for number in range(draw(st.integers(1, 4))):
        rows: dict[int, Ids] = {}
        key, stop = None, 0
        for part in range(draw(st.integers(1, 3))):
            start, count = max(0, stop + draw(st.integers(-3, 1))), draw(st.integers(1, 6))
            ids = routes(count, LAYERS, experts, seed=10 * number + part)
            ids[:, [layer for layer in range(LAYERS) if layer not in moe]] = 0
            record = make_record(ids, num_experts=experts, start=start, moe_layers=moe)
            key = store.put(record, parent=key)
            for row in range(count):
                rows.setdefault(start + row, ids[row])
            stop = max(stop, start + count)
        assert key is not None
        first = draw(st.integers(0, 3))
        world.sequences.append(RoutedSequence(key, draw(st.integers(1, stop + 2)), first))
        world.truth.append({row - first: ids for row, ids in rows.items()})
    return world


@dataclass(frozen=True)
class Grid:
    """How many ranks there are, and how they pad and split."""

    layout: Any
    cp: int
    sp: int
    style: Any
    tail: Any
    total: int
    stages: tuple[tuple[int, ...], ...]
    dense: Any
    pad: Any
    dtype: Any

    def ranks(self, stage: tuple[int, ...]) -> list[RankSlice]:
        """Return a pipeline stage's ranks, context parallel ones first."""
        return [
            RankSlice(
                2 * self.cp * self.sp, self.total, self.tail, self.cp, c, self.style, self.sp, s,
                stage, self.dense,
            )
            for c, s in itertools.product(range(self.cp), range(self.sp))
        ]  # fmt: skip


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    layout, cp, sp = (
        draw(st.sampled_from(["packed", "padded"])),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2])),
    )
    each = 2 * cp * sp
    stages = (((0, 1, 2, 3, 4),), ((0, 1), (2, 3, 4)), ((0, 3), (), (1, 4), (2,)))
    return Grid(
        layout,
        cp,
        sp,
        draw(st.sampled_from(["zigzag", "contiguous", "zigzag_buffer"])),
        draw(st.sampled_from(["last_sequence", "own_sequence", "rank"])),
        1 if layout == "padded" else draw(st.sampled_from([1, each, 5 * each])),
        draw(st.sampled_from(stages)),
        draw(st.sampled_from(["keep", "drop"])),
        draw(st.sampled_from(["mask", "spread", "random", "random_with_repetition"])),
        draw(st.sampled_from([None, "int64"])),
    )


def order_of(grid: Grid, boundaries: list[int], tail_rows: int) -> list[Ids]:
    """Each rank's rows, by their numbers in the padded batch: the definition, with numpy."""
    rows, cuts = np.arange(boundaries[-1]), boundaries[1:-1]
    sequences = np.split(rows, cuts) if grid.layout == "packed" else rows.reshape(len(cuts) + 1, -1)
    ranks: list[Ids] = []
    for c in range(grid.cp):
        if grid.layout == "padded" or (grid.style == "zigzag" and grid.cp > 1):
            parts = []
            for one in sequences:
                chunks = np.split(one, 2 * grid.cp)
                zigzag = np.r_[chunks[c], chunks[-1 - c]] if grid.cp > 1 else one
                cut = np.split(one, grid.cp)[c] if grid.style == "contiguous" else zigzag
                parts.append(np.split(cut, grid.sp) if grid.layout == "padded" else [cut])
            shares = [np.concatenate(share) for share in zip(*parts, strict=True)]
        elif grid.style == "zigzag_buffer":
            chunks = np.split(rows, 2 * grid.cp)
            shares = [np.r_[chunks[c], chunks[-1 - c]]]
        else:
            shares = [np.split(rows, grid.cp)[c]]
        if grid.layout == "packed":
            own = boundaries[-1] + c * tail_rows + np.arange(tail_rows)
            shares = np.split(np.r_[shares[0], own], grid.sp)
        ranks += shares
    return ranks


def reference(world: World, grid: Grid) -> tuple[Ids, Ids, list[int], int]:
    """Lay all rows out one after the other; return ids, valid, boundaries and the rank's tail."""
    lengths = [sequence.length for sequence in world.sequences]
    each = 2 * grid.cp * grid.sp
    padded = [-(-n // each) * each for n in lengths]
    if grid.layout == "padded":
        padded = [max(padded)] * len(padded)
    tail_rows, surplus = 0, -sum(padded) % grid.total
    if grid.tail == "rank":
        surplus, tail_rows = 0, -(sum(padded) // grid.cp) % grid.total
    if grid.tail == "last_sequence":
        padded[-1] += surplus
    starts = np.cumsum([0, *padded]).tolist()
    count = starts[-1] + surplus * (grid.tail == "own_sequence") + tail_rows * grid.cp
    ids = np.zeros((count, LAYERS, TOP_K), np.int64)
    valid = np.zeros(count, bool)
    for start, length, rows in zip(starts, lengths, world.truth, strict=False):
        for row in range(length):
            if row in rows:
                ids[start + row], valid[start + row] = rows[row], True
    own = grid.tail == "own_sequence" and surplus
    return ids, valid, [*starts, starts[-1] + surplus] if own else starts, tail_rows


def spec_of(grid: Grid, rank: RankSlice) -> BatchSpec:
    return BatchSpec(grid.dtype, "mask", grid.layout, rank, grid.pad, pad_seed=7)


@given(world=worlds(), grid=grids())
def test_any_split_any_layout_any_grid(world: World, grid: Grid) -> None:
    ids, valid, boundaries, tail_rows = reference(world, grid)
    orders = order_of(grid, boundaries, tail_rows)
    whole = np.full((len(ids), LAYERS, TOP_K), -1)
    for stage in grid.stages:
        kept = [one for one in stage if grid.dense == "keep" or one in world.moe]
        for rank, rows in zip(grid.ranks(stage), orders, strict=True):
            batch = materialize(world.store, world.sequences, spec_of(grid, rank))
            found = batch.ids.reshape(len(rows), len(kept), TOP_K)
            narrow = np.uint8 if world.experts <= 256 else np.uint16
            assert batch.ids.dtype == np.dtype(grid.dtype or narrow)
            assert batch.ids.ndim == (4 if grid.layout == "padded" else 3)
            assert batch.columns == tuple(kept)
            assert batch.layers == tuple(one for one in kept if one in world.moe)
            np.testing.assert_array_equal(batch.valid.reshape(-1), valid[rows])
            real = valid[rows]
            np.testing.assert_array_equal(found[real], ids[rows][real][:, kept])
            ends = [*boundaries, len(ids)] if tail_rows else boundaries
            assert batch.cu_seqlens.tolist() == ends
            mine = np.ix_(rows, np.array(kept, int))
            assert ((whole[mine] == -1) | (whole[mine] == found)).all()
            whole[mine] = found
            check_padding(found[~real], grid, world.experts)
    one = replace(spec_of(grid, RankSlice(2 * grid.cp * grid.sp, grid.total)), dtype=None)
    if grid.tail == "own_sequence":
        gathered = materialize(world.store, world.sequences, one).ids.reshape(whole.shape)
        kept = [n for stage in grid.stages for n in stage if grid.dense == "keep" or n in world.moe]
        np.testing.assert_array_equal(whole[:, kept], gathered[:, kept])


def check_padding(padding: Ids, grid: Grid, experts: int) -> None:
    assert padding.size == 0 or 0 <= padding.min() <= padding.max() < experts
    if grid.pad == "mask":
        assert not padding.any()
    if grid.pad in ("spread", "random"):
        assert (padding[..., 0] != padding[..., 1]).all()


def numbered(sequences: Sequence[RoutedSequence], nodes: int) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for number in range(len(sequences)):
        places.setdefault(f"node {number % nodes}", []).append(number)
    return places


@given(world=worlds(), grid=grids(), nodes=st.integers(1, 3), random=st.randoms())
def test_shares_of_many_nodes_together_are_the_batch(
    world: World, grid: Grid, nodes: int, random: Any
) -> None:
    spec = spec_of(grid, random.choice(grid.ranks(random.choice(grid.stages))))
    wanted = materialize(world.store, world.sequences, spec)
    rows = rank_rows([sequence.length for sequence in world.sequences], spec)
    shares = share_out(world.sequences, numbered(world.sequences, nodes), rows)
    answers = [answer_of(world, share, spec) for share in shares]
    found = join(shares, answers, rows, spec, None, np.empty)
    for field in ("ids", "valid", "cu_seqlens"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))
        assert getattr(found, field).dtype == getattr(wanted, field).dtype
    assert found.missing == wanted.missing
    assert (found.columns, found.layers, found.model) == (
        wanted.columns, wanted.layers, wanted.model,
    )  # fmt: skip
    out = np.empty_like(wanted.ids)
    assert join(shares, answers, rows, spec, out, np.empty).ids is out
    np.testing.assert_array_equal(out, wanted.ids)


def answer_of(world: World, share: Share, spec: BatchSpec) -> PackedExperts:
    narrow = replace(spec, dtype=None)
    return materialize(world.store, share.sequences, narrow, pieces=share.pieces)


def two_models() -> tuple[MemoryStore, list[RoutedSequence]]:
    store = MemoryStore("grid", StoreArgs(backend="memory"))
    keys = [store.put(make_record(routes(4, layers), num_experts=16)) for layers in (3, 4)]
    return store, [RoutedSequence(key, 4) for key in keys]


def test_nodes_with_records_of_two_models_do_not_mix() -> None:
    store, sequences = two_models()
    spec = BatchSpec(rank=RankSlice(layers=(0, 1)))
    rows = rank_rows([4, 4], spec)
    shares = share_out(sequences, {"a": [0], "b": [1]}, rows)
    answers = [materialize(store, s.sequences, spec, pieces=s.pieces) for s in shares]
    with pytest.raises(RecordError, match=r"node b have .*\(4, 2, 16.*node a \(3, 2, 16"):
        join(shares, answers, rows, spec, None, np.empty)


def test_a_rank_without_rows_of_a_node_still_meets_its_gaps() -> None:
    """All ranks must fail alike, or those that go on wait for the others for ever."""
    store = MemoryStore("grid", StoreArgs(backend="memory"))
    key = store.put(make_record(routes(4, 3), num_experts=16))
    with pytest.raises(RoutesGap, match="rows 4 to 5 were never captured"):
        materialize(store, [RoutedSequence(key, 6)], pieces=[])


@pytest.mark.parametrize("pad", ["mask", "spread", "random", "random_with_repetition"])
@pytest.mark.parametrize("layers", [(0, 1), ()])
def test_a_stage_without_moe_layers_has_no_columns(layers: tuple[int, ...], pad: Any) -> None:
    store = MemoryStore("grid", StoreArgs(backend="memory"))
    record = make_record(routes(4, 3), num_experts=16, moe_layers=(2,))
    sequence = RoutedSequence(store.put(record), 4)
    rank = RankSlice(total_multiple=8, layers=layers, dense_layers="drop")
    spec = BatchSpec("int64", rank=rank, pad=pad)
    batch = materialize(store, [sequence], spec)
    assert batch.ids.shape == (8, 0, 2)
    assert batch.ids.dtype == np.int64
    assert batch.columns == batch.layers == ()
    assert batch.valid.tolist() == [True] * 4 + [False] * 4
    rows = rank_rows([4], spec)
    share = share_out([sequence], {"node": [0]}, rows)[0]
    answer = materialize(store, share.sequences, replace(spec, dtype=None), pieces=share.pieces)
    joined = join([share], [answer], rows, spec, None, np.empty)
    assert joined.ids.shape == (8, 0, 2)
    assert joined.valid.tolist() == batch.valid.tolist()


def test_a_key_that_is_lost_is_masked_in_every_rank() -> None:
    store = MemoryStore("grid", StoreArgs(backend="memory"))
    good = store.put(make_record(routes(4, 3), num_experts=16))
    lost = Key("grid", "0000000000", 7, 0).sign(b"memory")
    both = [RoutedSequence(lost, 4), RoutedSequence(good, 4)]
    for rank in range(2):
        spec = BatchSpec(on_missing="mask", rank=RankSlice(4, cp_size=2, cp_rank=rank))
        batch = materialize(store, both, spec)
        assert batch.valid.tolist() == [False, False, True, True]
        assert [gap.index for gap in batch.missing] == [0]
