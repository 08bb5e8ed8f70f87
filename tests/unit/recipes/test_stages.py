"""Layers of pipeline stages, beside Megatron's own counts and offsets."""

from collections.abc import Callable
from itertools import product

import pytest

from examples.recipes.stages import Stages, laid_out, stages
from serve_app.config import StoreArgs
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, RankSlice, RoutedSequence
from tests.distinct_ids import distinct_ids

ROWS = {
    ("Megatron", "even stages, virtual ones too"),
    ("Megatron", "uneven stages"),
    ("Megatron", "embedding and loss in the split"),
    ("Megatron", "pipeline_model_parallel_layout"),
    ("Megatron", "MTP"),
}


def uneven(layers: int, pp: int, vp: int, first: int | None, last: int | None) -> Stages:
    """Megatron's offset of a stage: whole rounds of virtual stages, then the ranks before it."""
    middle_ranks = pp - (first is not None) - (last is not None)
    middle = layers - (first or 0) - (last or 0)
    a, m, z = (first or 0) // vp, middle // vp, (last or 0) // vp
    of: Stages = [[] for _ in range(pp)]
    for rank, stage in product(range(pp), range(vp)):
        offset = stage * (a + m + z)
        each = m // middle_ranks if middle_ranks else 0
        if rank > 0:
            offset += a + (rank - (first is not None)) * each
        count = a if rank == 0 and first is not None else each
        count = z if rank == pp - 1 and last is not None else count
        of[rank].append(tuple(range(offset, offset + count)))
    return of


def accounted(layers: int, pp: int, vp: int, embedding: bool, loss: bool) -> Stages:
    """Megatron's split when embedding and loss count as layers of the first and last stage."""
    total = layers + embedding + loss
    each = total // pp // vp
    of: Stages = [[] for _ in range(pp)]
    for rank, stage in product(range(pp), range(vp)):
        is_first, is_last = (rank, stage) == (0, 0), (rank, stage) == (pp - 1, vp - 1)
        offset = stage * (total // vp) + rank * each - (embedding and not is_first)
        count = each - (embedding and is_first) - (loss and is_last)
        of[rank].append(tuple(range(offset, offset + count)))
    return of


@pytest.mark.parametrize(
    ("layers", "pp", "vp"), [(48, 1, 1), (48, 4, 1), (48, 4, 3), (94, 2, 1), (8, 2, 4), (61, 1, 1)]
)
def test_even_stages(layers: int, pp: int, vp: int) -> None:
    assert stages(layers, pp, vp) == uneven(layers, pp, vp, None, None)
    assert stages(layers, pp, vp) == accounted(layers, pp, vp, False, False)


def test_layers_go_round_the_ranks() -> None:
    assert stages(8, 2, 2) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


@pytest.mark.parametrize(
    ("layers", "pp", "vp", "first", "last"),
    [
        (61, 4, 1, 13, None),
        (61, 4, 1, None, 13),
        (94, 8, 1, 11, 11),
        (61, 16, 1, 3, 2),
        (60, 4, 2, 12, 16),
        (40, 2, 2, 24, 16),
        (16, 3, 2, 4, None),
        (6, 3, 1, 0, None),
    ],
)
def test_uneven_stages(layers: int, pp: int, vp: int, first: int | None, last: int | None) -> None:
    split = stages(layers, pp, vp, first=first, last=last)
    assert split == uneven(layers, pp, vp, first, last)
    assert sorted(layer for rank in split for stage in rank for layer in stage) == [*range(layers)]


@pytest.mark.parametrize(
    ("layers", "pp", "vp", "embedding", "loss"),
    [
        (30, 4, 1, True, True),
        (31, 4, 1, True, False),
        (31, 4, 2, False, True),
        (46, 4, 3, True, True),
        (2, 4, 1, True, True),
        (6, 2, 4, True, True),
    ],
)
def test_embedding_and_loss_count_as_layers(
    layers: int, pp: int, vp: int, embedding: bool, loss: bool
) -> None:
    split = stages(layers, pp, vp, embedding=embedding, loss=loss)
    assert split == accounted(layers, pp, vp, embedding, loss)
    assert sorted(layer for rank in split for stage in rank for layer in stage) == [*range(layers)]


def test_a_pipeline_laid_out_by_hand() -> None:
    """The layout of DeepSeek-V3: 61 layers, 16 ranks of two stages, MTP and loss by themselves."""
    split = laid_out("Et*3|(tt|)*29,m|L", 16)
    names = [["E", "t", "t", "t"], *[["t", "t"]] * 29, ["m"], ["L"]]
    for rank, stage in product(range(16), range(2)):
        number = stage * 16 + rank
        offset = sum(one.count("t") for one in names[:number])
        layers = range(offset, offset + names[number].count("t"))
        assert split[rank][stage] == tuple(layers)
    assert split[0] == [(0, 1, 2), (33, 34)]
    assert split[14] == [(29, 30), ()]
    assert split[15] == [(31, 32), ()]
    assert laid_out("E|t*4|L", 3) == [[()], [(0, 1, 2, 3)], [()]]


def test_a_stage_with_mtp_layers_replays_its_decoder_layers_alone() -> None:
    """MTP layers count from 1 by themselves; no record has a column for them."""
    last = laid_out("Ettt|tttmL", 2)[1][0]
    assert last == (3, 4, 5)
    store = MemoryStore("stages", StoreArgs(backend="memory"))
    ids = distinct_ids((9, 6, 2), 16)
    sequence = RoutedSequence(
        store.put(make_record(ids, num_experts=16, moe_layers=(1, 2, 3, 4, 5))), 9
    )
    for rank in laid_out("Et|tt|tt|t|m|L", 3):
        for stage in rank:
            spec = BatchSpec(rank=RankSlice(layers=stage, dense_layers="drop", seq_multiple=4))
            batch = materialize(store, [sequence], spec)
            moe = [layer for layer in stage if layer != 0]
            assert batch.ids.shape == (12, len(moe), 2)
            assert batch.columns == tuple(moe)
            assert (batch.ids[:9] == ids[:, moe]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: stages(10, 4), "10 of 10 layers do not divide over 4 of 4 ranks"),
        (lambda: stages(10, 3, first=5), "5 of 10 layers do not divide over 2 of 3 ranks"),
        (lambda: stages(4, 2, first=5), "-1 of 4 layers"),
        (lambda: stages(12, 2, 4), "6 layers of a rank do not divide over 4 virtual stages"),
        (lambda: stages(10, 2, first=4, last=4), "2 of 10 layers do not divide over 0 of 2 ranks"),
        (lambda: stages(11, 2, first=5, loss=True), "embedding and loss count where"),
        (lambda: laid_out("Et|tt|L", 2), "3 stages of .* do not divide over 2 ranks"),
        (lambda: laid_out("Et|xL", 2), "expected stages of E, t, m and L in 'Et.xL', got 'x'"),
    ],
)
def test_pipelines_that_cannot_be(wrong: Callable[[], Stages], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
