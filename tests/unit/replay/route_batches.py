"""Batches of routes for a model, of given ids and of random ones."""

from dataclasses import replace
from typing import Any

import torch

from serve_app.engines.moe import moe_shape
from serve_app.types import ExpertBatch
from tests.unit.replay.passes import TOKENS


def batch_of(model: Any, ids: torch.Tensor, **changes: Any) -> ExpertBatch:
    """Ids ``[tokens, MoE layers or layers, top_k]`` as one sequence."""
    shape = moe_shape(model)
    batch = ExpertBatch(
        ids=ids,
        valid=torch.ones(len(ids), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        layers=shape.moe_layers,
        num_experts=shape.num_experts,
    )
    return replace(batch, **changes)


def random_ids(model: Any, tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    shape = moe_shape(model)
    scores = torch.rand(
        (tokens, len(shape.moe_layers), shape.num_experts),
        generator=torch.Generator().manual_seed(seed),
    )
    return scores.argsort(dim=-1)[..., : shape.top_k].to(torch.uint8)
