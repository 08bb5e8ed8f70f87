"""What a checkpoint promises to LMDeploy 0.18: its layers with experts, its tokenizer, its end.

LMDeploy answers ``routed_experts=None`` for most families without a word, so which ones give
routes is a table here, and a probe request proves it (`probe`).
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


def _deepseek_layers(config: Config) -> tuple[int, ...]:
    first, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
    return tuple(n for n in range(first, config["num_hidden_layers"]) if n % every == 0)


ROUTED: dict[str, Callable[[Config], tuple[int, ...]]] = {
    "Qwen3MoeForCausalLM": _qwen_layers,
    "Qwen3VLMoeForConditionalGeneration": _qwen_layers,
    "Qwen3_5MoeForConditionalGeneration": _all_layers,
    "InternS1ProForConditionalGeneration": _qwen_layers,
    "InternS1_1_ForConditionalGeneration": _qwen_layers,
    "InternS2PreviewForConditionalGeneration": _all_layers,
    "InternS2PreviewForCausalLM": _all_layers,
    "GptOssForCausalLM": _all_layers,
    "GlmMoeDsaForCausalLM": _deepseek_layers,
    "KimiK25ForConditionalGeneration": _deepseek_layers,
    "Kimi_K25ForConditionalGeneration": _deepseek_layers,
}
"""Architectures that LMDeploy 0.18 gives routes for, and which of their layers have experts."""

DIES_OF_DENSE_LAYERS = {
    name for name, layers in ROUTED.items() if layers is _qwen_layers and "Intern" not in name
}
"""Their dense MLP does not take the argument that carries the routes: a `TypeError` ends the
engine at its first step."""


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
    family = (whole.get("architectures") or ["?"])[0]
    config: Config = whole.get("text_config") or whole
    routed = args.enable_return_routed_experts
    if routed and family not in ROUTED:
        raise ValueError(
            f"LMDeploy 0.18 gives no routed experts for {family}: expected one of"
            f" {', '.join(sorted(ROUTED))}, or enable_return_routed_experts off"
        )
    layers = int(config["num_hidden_layers"])
    moe_layers = ROUTED[family](config) if family in ROUTED else ()
    if family in DIES_OF_DENSE_LAYERS and len(moe_layers) < layers:
        dense = sorted(set(range(layers)) - set(moe_layers))
        raise ValueError(
            f"LMDeploy 0.18 cannot run {family} with dense layers (it dies of a TypeError at the"
            f" first request): expected experts in all {layers} layers, got none in {dense}"
        )
    info = ModelInfo(
        family=family,
        layers=layers,
        moe_layers=moe_layers,
        num_experts=_first(config, EXPERTS_NAMES),
        top_k=_first(config, TOP_K_NAMES),
        vocab_size=int(config["vocab_size"]),
        context_length=context_length(args.context_length, config.get("max_position_embeddings")),
    )
    return ServedModel(info, _eos_ids(path, config), read_decoder(path))


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
