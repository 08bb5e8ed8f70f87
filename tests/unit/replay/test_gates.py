"""Gate weights of forced experts, computed by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve_app.engines.moe import find_moe_blocks
from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import TOKENS, random_tokens
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("normalised", [True, False])
def test_qwen3_moe_block_by_hand(normalised: bool) -> None:
    model = tiny("qwen3_moe", norm_topk_prob=normalised)
    block = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)), torch.no_grad():
        model(random_tokens(), use_cache=False)
    hook.remove()
    hidden, output = (tensor.view(TOKENS, -1) for tensor in seen)

    with torch.no_grad():
        chosen = ids[:, 1].long()
        gates = (hidden @ block.gate.weight.T).softmax(-1).gather(-1, chosen)
        if normalised:
            gates = gates / gates.sum(-1, keepdim=True)
        gate_up = torch.einsum("th,tkfh->tkf", hidden, block.experts.gate_up_proj[chosen])
        gate, up = gate_up.chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        by_expert = torch.einsum("tkf,tkhf->tkh", inner, block.experts.down_proj[chosen])
        expected = (gates[..., None] * by_expert).sum(1)
    torch.testing.assert_close(output, expected)


def _softmax(logits: torch.Tensor, ids: torch.Tensor, _: Any) -> torch.Tensor:
    return logits.softmax(-1).gather(-1, ids)


def _softmax_normalised(logits: torch.Tensor, ids: torch.Tensor, router: Any) -> torch.Tensor:
    weights = _softmax(logits, ids, router)
    normalised: torch.Tensor = weights / weights.sum(-1, keepdim=True)
    return normalised


def _softmax_of_the_chosen(logits: torch.Tensor, ids: torch.Tensor, router: Any) -> torch.Tensor:
    weights: torch.Tensor = (logits + router.bias).gather(-1, ids).softmax(-1)
    return weights


def _sigmoid_normalised_scaled(
    logits: torch.Tensor, ids: torch.Tensor, router: Any
) -> torch.Tensor:
    """Without the bias that the router chooses by."""
    weights = logits.sigmoid().gather(-1, ids)
    scaled: torch.Tensor = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
    return scaled


@pytest.mark.parametrize(
    ("family", "formula"),
    [
        ("mixtral", _softmax_normalised),
        ("olmoe", _softmax),
        ("deepseek_v2", _softmax),
        ("deepseek_v3", _sigmoid_normalised_scaled),
        ("glm4_moe", _sigmoid_normalised_scaled),
        ("gpt_oss", _softmax_of_the_chosen),
    ],
)
def test_gate_weights_by_hand_and_no_group_limit_hides_a_forced_expert(
    family: str, formula: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
) -> None:
    model = tiny(family)
    router = next(block.router for block in find_moe_blocks(model) if block.layer == 2)
    for name, buffer in router.named_buffers():
        assert name == "e_score_correction_bias"
        buffer.copy_(torch.linspace(-2, 2, 8))
    seen: list[Any] = []
    hook = router.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)), torch.no_grad():
        model(random_tokens(), use_cache=False)
    hook.remove()
    hidden, (_, weights, _) = seen
    with torch.no_grad():
        logits = hidden.view(TOKENS, -1) @ router.weight.T
        expected = formula(logits, ids[:, -1].long(), router)
    torch.testing.assert_close(weights, expected)
    assert bool((weights > 0).all())
