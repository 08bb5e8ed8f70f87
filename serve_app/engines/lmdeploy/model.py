"""What a checkpoint promises to LMDeploy 0.18: its layers with experts, its tokenizer, its end.

LMDeploy answers ``routed_experts=None`` for most families without a word. Which ones give routes,
by themselves or by `capture`, is a table here, and a probe request proves it (`probe`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config import EngineArgs
from serve_app.engines.base import ModelInfo
from serve_app.engines.checkpoint_files import context_length, read_decoder
from serve_app.engines.detokenizer import Decode

Config = Mapping[str, Any]

EXPERTS_NAMES = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K_NAMES = ("num_experts_per_tok", "experts_per_token")


def _qwen_layers(config: Config) -> tuple[int, ...]:
    every = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    layers = range(config["num_hidden_layers"])
    return tuple(n for n in layers if n not in dense and (n + 1) % every == 0)


def _all_layers(config: Config) -> tuple[int, ...]:
    return tuple(range(config["num_hidden_layers"]))


def _dense_first(config: Config) -> tuple[int, ...]:
    return tuple(range(config.get("first_k_dense_replace") or 0, config["num_hidden_layers"]))


def _llama4_layers(config: Config) -> tuple[int, ...]:
    if (layers := config.get("moe_layers")) is not None:
        return tuple(layers)
    every = config.get("interleave_moe_layer_step") or 1
    return tuple(range(every - 1, config["num_hidden_layers"], every))


def _deepseek_layers(config: Config) -> tuple[int, ...]:
    first, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
    return tuple(n for n in range(first, config["num_hidden_layers"]) if n % every == 0)


ROUTED: dict[str, Callable[[Config], tuple[int, ...]]] = {
    # LMDeploy's own models return them.
    "Qwen3MoeForCausalLM": _qwen_layers,
    "Qwen3VLMoeForConditionalGeneration": _qwen_layers,
    "Qwen3_5MoeForConditionalGeneration": _all_layers,
    "InternS1ProForConditionalGeneration": _qwen_layers,
    "InternS1_1_ForConditionalGeneration": _qwen_layers,
    "InternS2PreviewForConditionalGeneration": _all_layers,
    "InternS2PreviewForCausalLM": _all_layers,
    "InternS2MobiusForConditionalGeneration": _all_layers,
    "InternS2MobiusForCausalLM": _all_layers,
    "MetaMoeForConditionalGeneration": _all_layers,
    "GptOssForCausalLM": _all_layers,
    "GlmMoeDsaForCausalLM": _deepseek_layers,
    "KimiK25ForConditionalGeneration": _deepseek_layers,
    "Kimi_K25ForConditionalGeneration": _deepseek_layers,
    # They are captured (`capture`).
    "DeepseekForCausalLM": _deepseek_layers,
    "DeepseekV2ForCausalLM": _deepseek_layers,
    "DeepseekV3ForCausalLM": _deepseek_layers,
    "DeepseekV32ForCausalLM": _deepseek_layers,
    "DeepseekV4ForCausalLM": _all_layers,
    "DeepseekVLV2ForCausalLM": _deepseek_layers,
    "Glm4MoeForCausalLM": _dense_first,
    "Glm4MoeLiteForCausalLM": _deepseek_layers,
    "HYV3ForCausalLM": _dense_first,
    "Llama4ForConditionalGeneration": _llama4_layers,
    "MixtralForCausalLM": _all_layers,
    "PhiMoEForCausalLM": _all_layers,
    "Qwen2MoeForCausalLM": _qwen_layers,
    "Qwen3NextForCausalLM": _qwen_layers,
    "Qwen3OmniMoeForConditionalGeneration": _qwen_layers,
}
"""Architectures that routes are given for, and which of their layers have experts."""

AROUND = {
    "InternS1ForConditionalGeneration",
    "InternVLChatModel",
    "InternVLForConditionalGeneration",
}
"""Models with images around a language model of an architecture of its own."""

UNROUTED = {
    "SDARMoeForCausalLM": "it denoises blocks of tokens: a token has routes in every pass",
}
"""MoE architectures that LMDeploy serves and nobody can give routes for."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """``decode=None``: it came without a tokenizer, so there is no text."""

    info: ModelInfo
    eos_ids: frozenset[int]
    decode: Decode | None


def read_model(args: EngineArgs) -> ServedModel:
    """Read config and tokenizer of ``args.model``; raise ValueError where LMDeploy fails them."""
    path = Path(args.model)
    whole: Config = json.loads((path / "config.json").read_text())
    config = _language_model(whole)
    family = _architecture(whole) or _architecture(config)
    layers_of = ROUTED.get(_architecture(config) if family in AROUND else family)
    if args.enable_return_routed_experts and layers_of is None:
        raise ValueError(_no_routes(family, _architecture(config)))
    layers = int(config["num_hidden_layers"])
    moe_layers = layers_of(config) if layers_of else ()
    info = ModelInfo(
        family=family or "?",
        layers=layers,
        moe_layers=moe_layers,
        num_experts=_first(config, EXPERTS_NAMES),
        top_k=_first(config, TOP_K_NAMES),
        vocab_size=int(config["vocab_size"]),
        context_length=context_length(args.context_length, config.get("max_position_embeddings")),
    )
    return ServedModel(info, _eos_ids(path, config), read_decoder(path))


def _language_model(whole: Config) -> Config:
    """Return the part of a config that is the language model's, which has layers and experts."""
    whole = whole.get("thinker_config") or whole
    names = ("text_config", "llm_config", "language_config")
    return next((whole[name] for name in names if whole.get(name)), whole)


def _architecture(config: Config) -> str:
    return str((config.get("architectures") or [""])[0])


def _no_routes(family: str, inner: str) -> str:
    named = f"{family} around {inner or '?'}" if family in AROUND else family or "?"
    because = f", since {UNROUTED[family]}" if family in UNROUTED else ""
    return (
        f"LMDeploy 0.18 gives no routed experts for {named}{because}: expected one of"
        f" {', '.join(sorted(ROUTED))}, or enable_return_routed_experts off"
    )


def _first(config: Config, names: tuple[str, ...]) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _eos_ids(path: Path, config: Config) -> frozenset[int]:
    """Those of generation_config.json, as Transformers stops; not LMDeploy's chat template's."""
    own = path / "generation_config.json"
    ids = json.loads(own.read_text()).get("eos_token_id") if own.is_file() else None
    if ids is None:
        ids = config.get("eos_token_id")
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
