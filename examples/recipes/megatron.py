"""Megatron as verl drives it: pipeline and virtual stages, context and sequence parallel ranks.

Every sequence is padded to ``2 * cp * tp`` rows, cut into ``2 * cp`` chunks of which rank r takes
r and, from the end, r again; sequence parallelism then splits the tokens over the tensor parallel
ranks. A virtual stage's routers get one ``[tokens, top_k]`` each, in the order of its layers.
Other trainers on Megatron pad otherwise, see `examples.recipes.slices`, and pipelines need not be
even, see `examples.recipes.stages`.

    python -m examples.recipes.megatron
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from examples.recipes.samples import Model, Sample, put_samples, served_store
from examples.recipes.slices import Place, verl
from examples.recipes.stages import stages
from serve_app.client import RoutedExpertsClient
from serve_app.types import ExpertBatch, RoutedSequence

MODEL = Model(dense_layers=(0, 5))


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of the parallel groups; ``vp`` virtual stages a pipeline rank."""

    pp: int = 2
    vp: int = 2
    cp: int = 2
    tp: int = 2

    def stage(self, layers: int, pp_rank: int, vp_rank: int) -> tuple[int, ...]:
        """Return a virtual stage's global layers: chunks go round the pipeline ranks."""
        return stages(layers, self.pp, self.vp)[pp_rank][vp_rank]


def stage_routes(
    client: RoutedExpertsClient,
    samples: Sequence[Sample],
    model: Model,
    grid: Grid,
    *,
    pp_rank: int,
    cp_rank: int,
    tp_rank: int,
) -> list[ExpertBatch]:
    """Return a batch for each virtual stage of one rank; only their bytes leave the store's node.

    All tokens of a sample are trained on, so its last row was never captured: it is
    ``valid=False`` as padding is. A router that routes by the ids alone needs distinct ones for
    both, and the loss mask leaves them out; one that takes a mask wants ``batch.valid``.
    """
    sequences = [RoutedSequence(sample.key, sample.tokens) for sample in samples]
    rows = verl(Place(grid.cp, cp_rank, grid.tp, tp_rank))
    return [
        client.materialize(
            sequences,
            pad="spread",
            rank=replace(
                rows, layers=grid.stage(model.layers, pp_rank, vp_rank), dense_layers="drop"
            ),
        )
        for vp_rank in range(grid.vp)
    ]


def target_indices(batch: ExpertBatch) -> list[torch.Tensor]:
    """Return ``[tokens, top_k]`` for ``set_target_indices`` of each of the stage's MoE routers."""
    return [batch.ids[:, column].long() for column in range(len(batch.columns))]


def by_hand(samples: Sequence[Sample], grid: Grid, layer: int, cp_rank: int, tp_rank: int) -> tuple[
    torch.Tensor, torch.Tensor
]:  # fmt: skip
    """Do as verl's preprocessing does with whole tensors; return ids and which of them are real."""
    multiple = 2 * grid.cp * grid.tp
    parts: list[torch.Tensor] = []
    real: list[torch.Tensor] = []
    for sample in samples:
        rows = -(-sample.tokens // multiple) * multiple
        ids = torch.zeros(rows, sample.routes.shape[-1], dtype=torch.long)
        ids[: sample.tokens - 1] = sample.routes[:, layer]
        chunks = ids.chunk(2 * grid.cp), (torch.arange(rows) < sample.tokens - 1).chunk(2 * grid.cp)
        for kept, whole in zip((parts, real), chunks, strict=True):
            kept += [whole[cp_rank], whole[2 * grid.cp - 1 - cp_rank]]
    return torch.cat(parts).chunk(grid.tp)[tp_rank], torch.cat(real).chunk(grid.tp)[tp_rank]


def run(client: RoutedExpertsClient) -> str:
    """Read every rank's part, compare it with the framework's own slicing, and release."""
    grid, samples = Grid(), put_samples(client, MODEL, (90, 41, 60, 33), tag="step-1")
    moved = []
    for pp_rank, cp_rank, tp_rank in product(range(grid.pp), range(grid.cp), range(grid.tp)):
        stages = stage_routes(
            client, samples, MODEL, grid, pp_rank=pp_rank, cp_rank=cp_rank, tp_rank=tp_rank
        )
        moved.append(sum(batch.ids.nbytes for batch in stages))
        for vp_rank, batch in enumerate(stages):
            stage = grid.stage(MODEL.layers, pp_rank, vp_rank)
            moe = [layer for layer in stage if layer in MODEL.moe_layers]
            for layer, found in zip(moe, target_indices(batch), strict=True):
                wanted, real = by_hand(samples, grid, layer, cp_rank, tp_rank)
                assert torch.equal(batch.valid, real)
                assert torch.equal(found[real], wanted[real])
    whole = client.materialize([RoutedSequence(sample.key, sample.tokens) for sample in samples])
    released = client.release(tag="step-1")
    return (
        f"{len(moved)} ranks, {max(moved)} bytes at most of {whole.ids.nbytes} to each,"
        f" {released} keys released"
    )


if __name__ == "__main__":
    with served_store() as store:
        print(run(store))
