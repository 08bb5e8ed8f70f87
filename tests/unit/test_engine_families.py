"""The Transformers engine on other families than its first: caches, windows and layouts differ."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs
from serve_app.engines.moe import find_moe_blocks
from serve_app.engines.recording import ExpertRecorder
from serve_app.engines.transformers import TransformersEngine
from tests.unit.engine_contract import agreement, check_rows, mixed_requests, request, sample

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.09,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "every layer slides": ("mixtral", {"num_local_experts": 8, "sliding_window": 8}),
    "layers slide in turn": ("gpt_oss", {"num_local_experts": 8, "sliding_window": 8}),
    "keys and values differ in width": ("deepseek_v3", DEEPSEEK),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path: Path, family: str, fields: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **fields})
    models: Any = AutoModelForCausalLM
    models.from_config(config).save_pretrained(path)
    return path


def load(path: Path, **fields: Any) -> TransformersEngine:
    return TransformersEngine(
        EngineArgs(
            model=str(path),
            dtype="float32",
            enable_return_routed_experts=True,
            max_batch_size=5,
            engine_kwargs={"num_threads": 1},
            **fields,
        )
    )


@torch.inference_mode()
async def check_against_teacher_forcing(path: Path, wanted: list[Any]) -> None:
    engine = load(path)
    done = await asyncio.gather(*(sample(engine, one) for one in wanted))
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    recorder = ExpertRecorder(find_moe_blocks(model))
    for one, rollout in zip(wanted, done, strict=True):
        check_rows(rollout.record, one.input_ids, rollout.ids, engine)
        with recorder.capture() as captured:
            model(input_ids=torch.tensor([[*one.input_ids, *rollout.ids][:-1]]))
        assert agreement(rollout.record, captured.ids()) == 1.0
    await engine.stop()


@pytest.mark.parametrize("name", FAMILIES)
async def test_records_are_those_of_teacher_forcing(tmp_path: Path, name: str) -> None:
    await check_against_teacher_forcing(write(tmp_path, *FAMILIES[name]), mixed_requests(8))


async def test_a_long_prompt_is_processed_in_pieces(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, hidden=32, layers=2, experts=8, top_k=2, context=4096)
    prompt = [(7 * i) % 500 for i in range(2500)]
    await check_against_teacher_forcing(
        path, [request(input_ids=prompt, max_new_tokens=8), request(max_new_tokens=40)]
    )


def test_a_model_with_another_kind_of_state_is_refused_by_name(tmp_path: Path) -> None:
    fields = {
        "num_experts": 8,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    }
    with pytest.raises(ValueError, match=r"qwen3_next: .* got linear_attention"):
        load(write(tmp_path, "qwen3_next", fields))
