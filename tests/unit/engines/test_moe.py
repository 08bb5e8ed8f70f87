from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLMoeConfig,
)

from serve_app.engines.moe import MoeShape, find_moe_blocks, moe_shape
from serve_app.errors import EngineError
from tests.families import COMMON, EXPERTS, REPLAYABLE, UNRECORDABLE, UNREPLAYABLE, tiny


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def ids_seen_by_experts(model: Any, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.experts.register_forward_pre_hook(
            lambda _, args, kwargs, block=block: seen.update(
                {block.layer: block.routed_ids(args, kwargs)}
            ),
            with_kwargs=True,
        )
        for block in find_moe_blocks(model)
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", [*REPLAYABLE, *UNREPLAYABLE])
def test_every_family_tells_the_ids_its_experts_use(family: str) -> None:
    model = tiny(family)
    shape = moe_shape(model)
    seen = ids_seen_by_experts(model, torch.arange(3, 15).view(2, 6))
    assert shape.family == model.config.model_type
    assert shape.num_experts == (10 if family == "longcat_flash" else 8)
    assert shape.top_k == 2
    assert shape.moe_layers
    assert tuple(sorted(seen)) == shape.moe_layers
    for ids in seen.values():
        assert ids.shape == (12, shape.top_k)
        assert 0 <= int(ids.min()) <= int(ids.max()) < shape.num_experts


@pytest.mark.parametrize("family", UNRECORDABLE)
def test_families_without_a_true_record_are_refused_by_name(family: str) -> None:
    model = tiny(family)
    with pytest.raises(EngineError, match=f"{family}: routed experts cannot be recorded"):
        find_moe_blocks(model)


def test_layers_are_global_indices_and_dense_ones_are_left_out() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0, 3])
    assert moe_shape(model) == MoeShape("qwen3_moe", 5, (1, 2, 4), 8, 2)
    for block in find_moe_blocks(model):
        assert block.block is model.model.layers[block.layer].mlp
        assert block.router is block.block.gate
        assert block.experts is block.block.experts


def test_gemma4_has_its_experts_in_the_decoder_layer_itself() -> None:
    model = tiny("gemma4_text")
    blocks = find_moe_blocks(model)
    assert [block.block for block in blocks] == list(model.model.layers)
    assert [block.router for block in blocks] == [layer.router for layer in model.model.layers]


def test_a_dense_model_has_no_blocks() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**COMMON))
    assert find_moe_blocks(model) == []
    assert moe_shape(model) == MoeShape("qwen3", 3, (), 0, 0)


def test_wrapped_models_and_bare_decoders_are_looked_into() -> None:
    model = tiny("deepseek_v3")
    expected = find_moe_blocks(model)
    assert [block.layer for block in expected] == [1, 2]
    assert find_moe_blocks(Wrapper(Wrapper(model))) == expected
    assert find_moe_blocks(model.model) == expected


def test_a_module_around_no_hugging_face_model_is_refused() -> None:
    with pytest.raises(EngineError, match="Linear contains no Hugging Face model"):
        find_moe_blocks(nn.Linear(2, 2))


def test_mtp_layers_are_not_counted() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=3)
    extra = tiny("qwen3_moe", num_hidden_layers=4)
    model.model.layers.append(extra.model.layers[3])
    model.mtp = nn.ModuleDict({"layers": nn.ModuleList(extra.model.layers[:1])})
    assert moe_shape(model) == MoeShape("qwen3_moe", 3, (0, 1, 2), 8, 2)


def test_of_a_vision_model_only_the_text_layers_count() -> None:
    config = Qwen3VLMoeConfig(
        text_config={
            **COMMON,
            **EXPERTS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "depth": 3,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
    auto_model: Any = AutoModelForImageTextToText
    model = auto_model.from_config(config)
    assert moe_shape(model) == MoeShape("qwen3_vl_moe_text", 3, (0, 1, 2), 8, 2)
    blocks = [block.block for block in find_moe_blocks(model)]
    assert blocks == [layer.mlp for layer in model.model.language_model.layers]


def test_experts_that_are_not_told_their_tokens_are_refused() -> None:
    model = tiny("qwen3_moe")
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(EngineError, match=r"layer 1 has experts in mlp.experts \(ModuleList\)"):
        find_moe_blocks(model)


def test_experts_without_a_router_are_refused() -> None:
    model = tiny("qwen3_moe")
    del model.model.layers[2].mlp.gate
    with pytest.raises(EngineError, match="in layer 2 has no child called gate or router"):
        find_moe_blocks(model)


def test_layers_of_different_widths_are_refused() -> None:
    model = tiny("qwen3_moe")
    model.model.layers[1] = tiny("qwen3_moe", num_experts=4).model.layers[1]
    with pytest.raises(EngineError, match=r"layers differ in .*\[\(4, 2\), \(8, 2\)\]"):
        find_moe_blocks(model)
