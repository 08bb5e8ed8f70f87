"""xtuner: one pack's ``rollout_routed_experts``, int64, padded and split as its trainer does.

xtuner trains on ``prompt + response[:-1]``, packs samples to ``pack_max_length`` with random
expert ids behind them, and each sequence parallel rank takes its contiguous share. It draws each
id by itself, so a row of padding may have an expert twice; ``pad="random"`` deals them out evenly.

    python -m examples.recipes.xtuner
"""

from collections.abc import Sequence

import torch

from examples.recipes.samples import Model, Sample, put_samples, served_store
from serve_app.client import RoutedExpertsClient
from serve_app.types import ExpertBatch, RankSlice, RoutedSequence

MODEL = Model()


def rollout_routed_experts(
    client: RoutedExpertsClient,
    samples: Sequence[Sample],
    *,
    pack_max_length: int,
    sp_size: int = 1,
    sp_rank: int = 0,
    seed: int = 0,
) -> ExpertBatch:
    """Return one rank's pack; ``.ids`` is what ``SequenceContext.rollout_routed_experts`` takes.

    The samples must fit: ``sum(tokens - 1) <= pack_max_length``.
    """
    return client.materialize(
        [RoutedSequence(sample.key, sample.tokens - 1) for sample in samples],
        dtype="int64",
        pad="random_with_repetition",
        pad_seed=seed,
        rank=RankSlice(total_multiple=pack_max_length, sp_size=sp_size, sp_rank=sp_rank),
    )


def run(client: RoutedExpertsClient) -> str:
    """Pack five samples for two sequence parallel ranks, compare, and release."""
    samples = put_samples(client, MODEL, (90, 41, 60, 33, 17), tag="step-1")
    ranks = [
        rollout_routed_experts(client, samples, pack_max_length=256, sp_size=2, sp_rank=rank)
        for rank in range(2)
    ]
    pack = torch.cat([rank.ids for rank in ranks])
    valid = torch.cat([rank.valid for rank in ranks])
    by_hand = torch.cat([sample.routes for sample in samples])
    assert pack.shape == (256, MODEL.layers, MODEL.top_k)
    assert pack.dtype == torch.int64
    assert torch.equal(pack[: len(by_hand)], by_hand)
    assert valid.tolist() == [True] * len(by_hand) + [False] * (256 - len(by_hand))
    assert int(pack.max()) < MODEL.experts
    # The old-log-probability pass and the training forward read the same tensors. Then, after the
    # optimizer step and its barrier, the controller ends the step's keys; ranks never do.
    released = client.release(tag="step-1")
    return f"{len(samples)} samples, {len(pack)} rows for 2 ranks, {released} keys released"


if __name__ == "__main__":
    with served_store() as store:
        print(run(store))
