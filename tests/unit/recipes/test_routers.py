"""What routers take for a batch's rows, beside what each kind does with it."""

from typing import Any

import numpy as np
import pytest
import torch

from examples.recipes.megatron import target_indices
from examples.recipes.slices import Place
from serve_app.client import RoutedExpertsClient
from serve_app.client.served import Handles
from serve_app.types import ExpertBatch, RankSlice, RoutedSequence
from tests.distinct_ids import distinct_ids

ROWS = {
    ("Megatron", "router that goes by the ids alone"),
    ("miles, NeMo-RL", "router that takes -1"),
    ("verl", "router that takes a mask"),
    ("Megatron", 'fed from layout="padded"'),
}
EXPERTS, LAYERS, TOP_K = 16, 3, 4
LENGTHS = (5, 9, 3)
Routes = dict[tuple[int, int], torch.Tensor]
"""True experts ``[layers, top_k]`` of each captured row, by sequence and row."""


@pytest.fixture
def client() -> RoutedExpertsClient:
    return RoutedExpertsClient("routers", handles=Handles(None, None, "routers"))


def put(client: RoutedExpertsClient) -> tuple[list[RoutedSequence], Routes]:
    sequences, routes = [], Routes()
    for number, tokens in enumerate(LENGTHS):
        ids = distinct_ids((tokens - 1, LAYERS, TOP_K), EXPERTS, seed=number)
        sequences.append(RoutedSequence(client.put(ids, num_experts=EXPERTS), tokens))
        routes.update({(number, row): torch.from_numpy(ids[row]) for row in range(tokens - 1)})
    return sequences, routes


def packed(client: RoutedExpertsClient, **how: Any) -> tuple[ExpertBatch, torch.Tensor]:
    """Give a padded batch and, for each row, its true routes, or -1: to be routed natively."""
    sequences, routes = put(client)
    batch = client.materialize(sequences, rank=RankSlice(seq_multiple=8, total_multiple=40), **how)
    wanted = torch.full((len(batch.ids), LAYERS, TOP_K), -1)
    for (number, row), experts in routes.items():
        wanted[int(batch.cu_seqlens[number]) + row] = experts
    return batch, wanted


def native(rows: int, seed: int = 0) -> torch.Tensor:
    """What a router chooses by itself, ``[rows, top_k]``."""
    scores = torch.rand(rows, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return scores.topk(TOP_K).indices


def with_minus_one(target: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Route rows of nothing but -1 natively, and all others as they say."""
    missing = (target == -1).all(-1)
    used = target.clone()
    used[missing] = own[missing]
    return used


def with_mask(target: torch.Tensor, mask: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.unsqueeze(-1), target, own)


def test_a_router_that_takes_minus_one(client: RoutedExpertsClient) -> None:
    batch, wanted = packed(client, dtype="int64")
    ids = torch.where(batch.valid[:, None, None], batch.ids, -1)
    for column in range(LAYERS):
        own = native(len(ids), seed=column)
        used = with_minus_one(ids[:, column], own)
        assert torch.equal(used, torch.where(wanted[:, column] >= 0, wanted[:, column], own))
        assert int(used.min()) >= 0


def test_a_router_that_takes_a_mask(client: RoutedExpertsClient) -> None:
    batch, wanted = packed(client)
    for column, target in enumerate(target_indices(batch)):
        own = native(len(target), seed=column)
        used = with_mask(target, batch.valid, own)
        assert torch.equal(used, torch.where(wanted[:, column] >= 0, wanted[:, column], own))


def experts_of_rows(target: torch.Tensor) -> torch.Tensor:
    """How many experts each row goes to: a map of tokens and experts has one place for a pair."""
    routing_map = torch.zeros(len(target), EXPERTS, dtype=torch.bool)
    return routing_map.scatter_(1, target, True).sum(1)


@pytest.mark.parametrize(("pad", "least"), [("spread", TOP_K), ("random", TOP_K), ("mask", 1)])
def test_a_router_that_goes_by_the_ids_alone(
    client: RoutedExpertsClient, pad: Any, least: int
) -> None:
    batch, wanted = packed(client, pad=pad)
    for column, target in enumerate(target_indices(batch)):
        real = wanted[:, column, 0] >= 0
        assert torch.equal(target[real], wanted[real, column])
        counts = experts_of_rows(target)
        assert counts[real].tolist() == [TOP_K] * int(real.sum())
        assert counts[~real].tolist() == [least] * int((~real).sum())


def sequence_first(hidden: torch.Tensor) -> torch.Tensor:
    """Flatten ``[s, b, h]`` to tokens as a Megatron router does."""
    return hidden.reshape(-1, hidden.shape[-1])


@pytest.mark.parametrize("place", [Place(), Place(2, 1), Place(2, 0, 2, 1)])
def test_a_padded_batch_goes_to_megatron_sequence_first(
    client: RoutedExpertsClient, place: Place
) -> None:
    """Each token carries its sequence and row through the split that Megatron gives it."""
    sequences, routes = put(client)
    rows = 16
    batch = client.materialize(
        sequences, layout="padded", rank=place.slice(seq_multiple=rows), dtype="int64"
    )
    numbers, at = np.meshgrid(np.arange(len(LENGTHS)), np.arange(rows))
    hidden = torch.from_numpy(np.stack([numbers, at], -1))  # [s, b, 2]
    if place.cp_size > 1:
        chunks = hidden.chunk(2 * place.cp_size)
        hidden = torch.cat([chunks[place.cp_rank], chunks[-1 - place.cp_rank]])
    hidden = hidden.chunk(place.tp_size)[place.tp_rank]
    tokens = [(number, row) for number, row in sequence_first(hidden).tolist()]
    valid = batch.valid.transpose(0, 1).flatten()
    ids = batch.ids.transpose(0, 1).flatten(0, 1)
    assert valid.tolist() == [token in routes for token in tokens]
    for row, token in enumerate(tokens):
        if token in routes:
            assert torch.equal(ids[row], routes[token])
