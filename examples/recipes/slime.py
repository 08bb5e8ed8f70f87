"""slime on Megatron: zigzag over context parallel ranks, then each rank's tail padded.

Each sequence is padded to ``2 * cp`` rows and cut zigzag; a rank's tokens together are padded to
``tp * data_pad_size_multiplier`` with ids that count round the experts, and sequence parallelism
splits them over the tensor parallel ranks.

    python -m examples.recipes.slime
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch

from examples.recipes.samples import Model, Sample, put_samples, served_store
from examples.recipes.slices import Place, slime
from serve_app.client import RoutedExpertsClient
from serve_app.types import ExpertBatch, RoutedSequence

MODEL = Model()
CP, TP, PAD_MULTIPLIER = 2, 2, 16


def routing_replay(
    client: RoutedExpertsClient,
    samples: Sequence[Sample],
    layers: tuple[int, ...],
    *,
    cp_rank: int,
    tp_rank: int,
) -> ExpertBatch:
    """Return one micro-batch's routes of this rank, for ``RoutingReplay.record`` layer by layer.

    ``cu_seqlens`` are slime's: the padded boundaries of all ranks, with the tails as one more
    sequence.
    """
    return client.materialize(
        [RoutedSequence(sample.key, sample.tokens) for sample in samples],
        pad="spread",
        rank=replace(
            slime(Place(CP, cp_rank, TP, tp_rank), PAD_MULTIPLIER),
            layers=layers,
            dense_layers="drop",
        ),
    )


def by_hand(samples: Sequence[Sample], cp_rank: int, tp_rank: int) -> tuple[
    torch.Tensor, torch.Tensor, list[int]
]:  # fmt: skip
    """Do as slime's ``fill_routing_replay`` and ``get_batch``: ids, which are real, cu_seqlens."""
    parts, ends = [], [0]
    for sample in samples:
        marked = torch.full((sample.tokens, *sample.routes.shape[1:]), -1)
        marked[:-1] = sample.routes
        rows = -(-sample.tokens // (2 * CP)) * 2 * CP
        padded = torch.full((rows, *marked.shape[1:]), -1)
        padded[: sample.tokens] = marked
        chunks = padded.chunk(2 * CP)
        parts += [chunks[cp_rank], chunks[2 * CP - 1 - cp_rank]]
        ends.append(ends[-1] + rows // CP)
    local = torch.cat(parts)
    if pad := -len(local) % (TP * PAD_MULTIPLIER):
        local = torch.cat([local, torch.full((pad, *local.shape[1:]), -1)])
        ends.append(ends[-1] + pad)
    mine = local.chunk(TP)[tp_rank]
    return mine, (mine >= 0).all(-1).all(-1), [CP * end for end in ends]


def run(client: RoutedExpertsClient) -> str:
    """Read a micro-batch on every rank of a stage, compare with slime's own way, and release."""
    samples = put_samples(client, MODEL, (90, 41, 60, 33), tag="step-1")
    stage = (0, 1, 2, 3)
    for cp_rank, tp_rank in product(range(CP), range(TP)):
        batch = routing_replay(client, samples, stage, cp_rank=cp_rank, tp_rank=tp_rank)
        wanted, real, cu_seqlens = by_hand(samples, cp_rank, tp_rank)
        assert batch.columns == (1, 2, 3)  # layer 0 is dense: no router there
        assert torch.equal(batch.valid, real)
        assert torch.equal(batch.ids[real].long(), wanted[real][:, list(batch.columns)])
        assert batch.cu_seqlens.tolist() == cu_seqlens
    released = client.release(tag="step-1")
    return f"{CP * TP} ranks of {len(batch.ids)} rows, {released} keys released"


if __name__ == "__main__":
    with served_store() as store:
        print(run(store))
