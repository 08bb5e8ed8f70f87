"""Loading a Hugging Face checkpoint: the model, its tokenizer and what they promise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from transformers import AutoModelForCausalLM, PreTrainedModel

from serve_app.config import EngineArgs
from serve_app.engines.base import ModelInfo
from serve_app.engines.checkpoint_files import context_length, read_decoder
from serve_app.engines.detokenizer import Decode
from serve_app.engines.moe import MoeBlock, MoeShape, family_of, find_moe_blocks, shape_of
from serve_app.errors import EngineError


class Options(BaseModel):
    """What `EngineArgs.engine_kwargs` may say to this engine.

    Only eager attention finds the routes of teacher forcing in bf16; sdpa misses up to 5 %.
    An engine whose step takes longer than ``step_timeout_s`` is unhealthy.

    One thread, because products as small as a step's gain at most a tenth from a second one on a
    free core, and wait 10 times as long for it on a busy one (measured, 2 cores): every one of
    them ends in a barrier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attn_implementation: Literal["eager", "sdpa"] = "eager"
    num_threads: PositiveInt = 1
    step_timeout_s: PositiveFloat = 300.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model. ``decode=None``: it came without a tokenizer."""

    model: PreTrainedModel
    blocks: list[MoeBlock]
    info: ModelInfo
    eos_ids: frozenset[int]
    decode: Decode | None
    options: Options


def load_checkpoint(args: EngineArgs) -> Checkpoint:
    """Load what ``args`` name. Raises ValueError where the two do not fit together."""
    options = _options(args.engine_kwargs)
    model = load_model(args, options)
    blocks, shape = _experts(model, required=args.enable_return_routed_experts)
    config: Any = model.config.get_text_config()
    info = ModelInfo(
        family=shape.family,
        layers=shape.layers,
        moe_layers=shape.moe_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        vocab_size=config.vocab_size,
        context_length=context_length(
            args.context_length, getattr(config, "max_position_embeddings", None)
        ),
    )
    return Checkpoint(model, blocks, info, _eos_ids(model), read_decoder(Path(args.model)), options)


def load_model(args: EngineArgs, options: Options) -> PreTrainedModel:
    """Load the model in its dtype; a cast would also change RoPE frequencies and router biases.

    (``.to(bfloat16)`` casts what the model keeps in fp32.)
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=getattr(torch, args.dtype),
        attn_implementation=options.attn_implementation,
        local_files_only=True,
    )
    return model


def _options(engine_kwargs: dict[str, Any]) -> Options:
    known = set(Options.model_fields)
    if unknown := set(engine_kwargs) - known:
        raise ValueError(
            f"engine_kwargs of the transformers backend: expected some of {sorted(known)},"
            f" got {sorted(unknown)}"
        )
    return Options.model_validate(engine_kwargs)


def _experts(model: PreTrainedModel, *, required: bool) -> tuple[list[MoeBlock], MoeShape]:
    if not required:
        return _experts_if_readable(model)
    blocks = find_moe_blocks(model)
    if not blocks:
        raise ValueError(
            f"enable_return_routed_experts needs a mixture-of-experts model,"
            f" {family_of(model)} is dense: switch it off, or serve another checkpoint"
        )
    return blocks, shape_of(model, blocks)


def _experts_if_readable(model: PreTrainedModel) -> tuple[list[MoeBlock], MoeShape]:
    """Families whose experts cannot be read are served all the same, without records."""
    try:
        blocks = find_moe_blocks(model)
    except EngineError:
        blocks = []
    return blocks, shape_of(model, blocks)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    config = model.generation_config
    ids: int | list[int] | None = config.eos_token_id if config is not None else None
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
