"""Families whose models LMDeploy lets forget their routes, sampled by the real engine on a CPU."""

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.tiny_moe import write_checkpoint, write_tokenizer
from serve_app.config import EngineArgs
from serve_app.engines.lmdeploy.model import AROUND, ROUTED, UNROUTED, read_model
from serve_app.records import Ids
from tests.engine_contract import agreement, request, sample
from tests.families import tiny
from tests.lmdeploy.conftest import load
from tests.plain_model import PlainModel

on_one_loop = pytest.mark.asyncio(loop_scope="module")

NEW = 8
PROMPTS = [[(a * i + b) % 90 + 3 for i in range(n)] for a, b, n in ((7, 1, 50), (3, 5, 9))]
IN_PIECES = {"max_prefill_token_num": 32}

LATENT = {"head_dim": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
LATENT_FIRST = {**LATENT, "n_shared_experts": 1}
LONG_ROPE = {
    "rope_theta": 10_000.0,
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
    "original_max_position_embeddings": 128,
}

# By family: what its tiny model is, and what real checkpoints' configs have besides.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek_v2": (
        {**LATENT_FIRST, "topk_method": "greedy"},
        {"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v3": (
        LATENT_FIRST,
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
    "glm4_moe": ({"n_shared_experts": 1, "n_group": 1, "topk_group": 1}, {}),
    "glm4_moe_lite": (LATENT_FIRST, {"topk_method": "noaux_tc", "first_k_dense_replace": 1}),
    "hy_v3": ({}, {"first_k_dense_replace": 1}),
    "mixtral": ({}, {}),
    "phimoe": (
        {"rope_parameters": LONG_ROPE},
        {"architectures": ["PhiMoEForCausalLM"], "input_jitter_noise": 0.0},
    ),
    "qwen2_moe": ({"mlp_only_layers": [1]}, {}),
    "qwen3_moe": ({"mlp_only_layers": [1]}, {}),
    "qwen3_next": (
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_value_heads": 4,
        },
        {"full_attention_interval": 4},
    ),
}
FIRST_IS_DENSE = {"deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "hy_v3"}
SECOND_IS_DENSE = {"qwen2_moe", "qwen3_moe"}


def written(family: str, path: Path) -> Path:
    values, besides = FAMILIES[family]
    tiny(family, **values).save_pretrained(path)
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | besides))
    write_tokenizer(path)
    return path


def greedy(plain: PlainModel, prompt: list[int]) -> tuple[list[int], Ids]:
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(plain.teacher_force(tokens)[1][-1].argmax()))
    return tokens, plain.teacher_force(tokens[:-1])[0]


def softmax_router(self: Any, hidden: torch.Tensor) -> Any:
    """What LMDeploy 0.18 has in GLM-4-MoE's place of a sigmoid, a bias and groups."""
    logits = torch.nn.functional.linear(hidden.view(-1, self.hidden_dim).float(), self.weight)
    weights, ids = logits.softmax(-1).topk(self.top_k)
    return logits, weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor, ids


@on_one_loop
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_familys_routes_are_the_plain_models(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(family, tmp_path)
    plain = PlainModel(path, torch.float32)
    if family == "glm4_moe":
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

        monkeypatch.setattr(Glm4MoeTopkRouter, "forward", softmax_router)
    engine = load(path, engine_kwargs=IN_PIECES)
    wanted = [request(input_ids=prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    for prompt, ours in zip(
        PROMPTS, await asyncio.gather(*(sample(engine, one) for one in wanted)), strict=True
    ):
        tokens, experts = greedy(plain, prompt)
        assert [*prompt, *ours.ids] == tokens
        assert agreement(ours.record, experts) == 1.0
        assert ours.record is not None
        layers = set(range(ours.record.ids.shape[1]))
        dense = {0} if family in FIRST_IS_DENSE else {1} if family in SECOND_IS_DENSE else set()
        assert layers - set(ours.record.moe_layers) == dense
    await engine.stop()


@on_one_loop
async def test_dense_layers_of_qwen3_moe_do_not_die_without_routes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, hidden=32, layers=3, experts=8, top_k=2, dense_layers=(1,))
    engine = load(path, enable_return_routed_experts=False)
    rollout = await sample(engine, request(return_routed_experts=False, max_new_tokens=NEW))
    assert (rollout.reason, len(rollout.ids), rollout.record) == ("length", NEW, None)
    await engine.stop()


# Which layers have experts, by what a config says.

QWEN = {"num_experts": 8, "mlp_only_layers": [0], "decoder_sparse_step": 2}
SIZES = {
    "num_hidden_layers": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 9,
    "max_position_embeddings": 9,
}
QWEN_INSIDE = {**SIZES, **QWEN, "architectures": ["Qwen3MoeForCausalLM"]}
ROUTED_EXPERTS = {**SIZES, "n_routed_experts": 8, "first_k_dense_replace": 1}


LLAMA = {**SIZES, "num_local_experts": 8}
VL2 = {"language_config": {**ROUTED_EXPERTS, "architectures": ["DeepseekV2ForCausalLM"]}}
OMNI = {"thinker_config": {"text_config": {**SIZES, **QWEN}}}


@pytest.mark.parametrize(
    ("architecture", "config", "layers"),
    [
        ("DeepseekForCausalLM", {**ROUTED_EXPERTS, "moe_layer_freq": 2}, (2,)),
        ("DeepseekV32ForCausalLM", ROUTED_EXPERTS, (1, 2, 3)),
        ("DeepseekV4ForCausalLM", {**SIZES, "n_routed_experts": 8}, (0, 1, 2, 3)),
        (None, VL2, (1, 2, 3)),
        (
            "Llama4ForConditionalGeneration",
            {"text_config": {**LLAMA, "interleave_moe_layer_step": 2}},
            (1, 3),
        ),
        ("Llama4ForConditionalGeneration", {"text_config": {**LLAMA, "moe_layers": [2]}}, (2,)),
        ("Qwen3OmniMoeForConditionalGeneration", OMNI, (1, 3)),
        ("InternVLChatModel", {"llm_config": QWEN_INSIDE}, (1, 3)),
        ("InternS1ForConditionalGeneration", {"text_config": QWEN_INSIDE}, (1, 3)),
    ],
)
def test_the_layer_map_is_the_familys(
    sparse: Path, tmp_path: Path, architecture: str | None, config: Any, layers: tuple[int, ...]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((sparse / name).read_bytes())
    named = {"architectures": [architecture]} if architecture else {}
    (tmp_path / "config.json").write_text(json.dumps(config | named))
    info = read_model(EngineArgs(model=str(tmp_path), enable_return_routed_experts=True)).info
    assert (info.moe_layers, info.layers, info.num_experts, info.top_k) == (layers, 4, 8, 2)
    assert info.family == (architecture or "DeepseekV2ForCausalLM")


def test_a_model_around_a_dense_one_is_refused_by_both_names(tmp_path: Path) -> None:
    inside = {**SIZES, "architectures": ["Qwen2ForCausalLM"]}
    whole = {"architectures": ["InternVLChatModel"], "llm_config": inside}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="for InternVLChatModel around Qwen2ForCausalLM: expected"):
        read_model(EngineArgs(model=str(tmp_path), enable_return_routed_experts=True))


def test_no_moe_family_of_lmdeploys_is_forgotten() -> None:
    from lmdeploy.pytorch.models.module_map import MODULE_MAP

    known = {*ROUTED, *UNROUTED, *AROUND}
    served = {name: path for name, path in MODULE_MAP.items() if "MTP" not in name}
    assert known <= set(served)
    for name in set(served) - known:
        spec = find_spec(served[name].rpartition(".")[0])
        assert spec is not None
        assert spec.origin is not None
        assert "build_fused_moe(" not in Path(spec.origin).read_text(), name
