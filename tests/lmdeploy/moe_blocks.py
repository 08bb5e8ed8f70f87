"""MoE blocks of LMDeploy's that no model on a CPU runs, and models around them."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

TOKENS, HIDDEN, EXPERTS, TOP_K, LAYERS = 5, 16, 8, 2, 4
ARGUMENT = "all_routed_experts"

CONFIG = SimpleNamespace(
    model_type="of a test",
    hidden_size=HIDDEN,
    intermediate_size=8,
    intermediate_size_mlp=8,
    moe_intermediate_size=8,
    n_routed_experts=EXPERTS,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    n_shared_experts=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    scoring_func="softmax",
    topk_method="greedy",
    n_group=4,
    topk_group=2,
    hidden_act="silu",
)


class Around(nn.Module):
    """A model of `LAYERS` layers; what is None among them is dense."""

    def __init__(self, *blocks: nn.Module | None) -> None:
        super().__init__()
        self.blocks = [nn.Identity() if block is None else block for block in blocks]
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": block}) for block in self.blocks)
        self.embed = nn.Embedding(50, HIDDEN)
        self.eval().float()
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.3)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for block in self.blocks:
            hidden = self.called(block, hidden, input_ids)
        return hidden

    def called(self, block: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = block(hidden)
        return found


class HandingNone(Around):
    """Qwen3-Omni's: its layers hand on a buffer that its model never makes."""

    def called(self, block: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        dense = isinstance(block, nn.Identity)
        return super().called(block, hidden, ids) if dense else block(hidden, **{ARGUMENT: None})


class HandingTokens(Around):
    """DeepSeek-V4's: it routes some layers by token."""

    def called(self, block: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        dense = isinstance(block, nn.Identity)
        return super().called(block, hidden, ids) if dense else block(hidden, ids)


def deepseek(layer: int, **fields: Any) -> Any:
    from lmdeploy.pytorch.models.deepseek_v2 import DeepseekV2MoE

    return DeepseekV2MoE(SimpleNamespace(**{**vars(CONFIG), **fields}), layer)


def deepseek_1(layer: int) -> Any:
    from lmdeploy.pytorch.models.deepseek import DeepseekMoE

    return DeepseekMoE(CONFIG)


def deepseek_v2_in_groups(layer: int) -> Any:
    return deepseek(layer, topk_method="group_limited_greedy")


def deepseek_v32(layer: int) -> Any:
    return deepseek(layer, topk_method="noaux_tc", scoring_func="sigmoid")


def llama4(layer: int) -> Any:
    from lmdeploy.pytorch.models.llama4 import Llama4TextMoe

    return Llama4TextMoe(CONFIG)


def mixtral(layer: int) -> Any:
    """Its block returns logits, too, which its layer drops."""
    from lmdeploy.pytorch.models.mixtral import MixtralSparseMoeBlock

    class Alone(MixtralSparseMoeBlock):  # type: ignore[misc]  # lmdeploy is untyped
        def forward(self, hidden_states: Any) -> Any:
            return super().forward(hidden_states)[0]

    return Alone(CONFIG)


def qwen3_omni(layer: int) -> Any:
    from lmdeploy.pytorch.models.qwen3_moe import Qwen3MoeSparseMoeBlock

    return Qwen3MoeSparseMoeBlock(CONFIG, layer)


def deepseek_v4(layer: int) -> Any:
    """Its gate is LMDeploy's; its experts, in four bits, need a GPU's operators."""
    from lmdeploy.pytorch.models.deepseek_v4 import Gate, MoE
    from lmdeploy.pytorch.nn.moe.v4_fp4 import FusedMoEV4FP4

    class Unquantized(FusedMoEV4FP4):  # type: ignore[misc]  # lmdeploy is untyped
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, x: Any, weights: Any, ids: Any) -> Any:
            return x * weights.sum(-1, keepdim=True)

    kinds = ["hash_moe", "moe", "moe", "moe"]
    args = SimpleNamespace(
        n_activated_experts=TOP_K,
        n_routed_experts=EXPERTS,
        dim=HIDDEN,
        vocab_size=50,
        score_func="sqrtsoftplus",
        route_scale=1.0,
        mlp_layer_types=kinds,
    )
    block = MoE.__new__(MoE)
    nn.Module.__init__(block)
    block.dim, block.gate, block.experts = HIDDEN, Gate(layer, args, None), Unquantized()
    block.shared_experts = nn.Identity()
    return block
