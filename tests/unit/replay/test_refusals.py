"""Batches that do not fit the model or its forward pass are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import random_tokens
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_must_match_the_forward() -> None:
    model = tiny("qwen3_moe")
    batch = batch_of(model, random_ids(model, tokens=23))
    message = "layer 0: the batch has routes for 23 token rows, the forward pass has 24"
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch):
        model(random_tokens(), use_cache=False)


def test_a_valid_row_holds_no_expert_twice() -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    ids[5, 1] = 3
    message = r"layer 1, row 5: expected 2 different expert ids in \[0, 8\), got \[3, 3\]"
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch_of(model, ids)):
        pass


@pytest.mark.parametrize("wrong", [8, -1])
def test_ids_are_in_range(wrong: int) -> None:
    model = tiny("deepseek_v3")
    ids = random_ids(model).to(torch.int32)
    ids[7, 0, 1] = wrong
    message = rf"layer 1, row 7: expected 2 .* in \[0, 8\), got \[\d, {wrong}\]"
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch_of(model, ids)):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 16}, "qwen3_moe has 8 experts, the batch 16"),
        ({"layers": (0, 1)}, r"has MoE layers \(0, 2\), the batch \(0, 1\)"),
        ({"ids": torch.zeros(24, 4, 2, dtype=torch.uint8)}, r"3 layers \(all\) or 2 .* got 4"),
        ({"ids": torch.zeros(24, 2, 3, dtype=torch.uint8)}, "has top-k 2, the batch 3"),
        ({"ids": torch.zeros(24, 4, dtype=torch.uint8)}, r"must be \[tokens, layers, top_k\]"),
        ({"ids": torch.zeros(24, 2, 2, dtype=torch.int16)}, r"int64, got torch\.int16"),
        ({"valid": torch.ones(23, dtype=torch.bool)}, r"valid must be bool \[24\], got .*\[23\]"),
        ({"valid": torch.ones(24)}, r"valid must be bool \[24\], got torch\.float32 \[24\]"),
    ],
)
def test_a_batch_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny("qwen3_moe", mlp_only_layers=[1])
    batch = replace(batch_of(model, random_ids(model)), **changes)
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch):
        pass
