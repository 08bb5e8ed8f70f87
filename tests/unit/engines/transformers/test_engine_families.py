"""The Transformers engine on other families than its first: caches, windows and layouts differ."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.tiny_moe import write_checkpoint, write_tokenizer
from serve_app.config import EngineArgs
from serve_app.engines.base import Engine
from serve_app.engines.moe import find_moe_blocks
from serve_app.engines.transformers.batch import PIECE
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.errors import EngineError, EngineUnavailable
from tests.engine_contract import (
    EngineContract,
    MakeEngine,
    Sampled,
    agreement,
    check_rows,
    mixed_requests,
    request,
    sample,
)
from tests.families import FAMILIES as ALL_FAMILIES
from tests.families import UNRECORDABLE, VOCAB, tiny
from tests.plain_model import PlainModel

pytestmark = pytest.mark.usefixtures("one_thread")

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
            engine_kwargs={"num_threads": 1},
            **{"max_batch_size": 5, **fields},
        )
    )


@torch.inference_mode()
async def check_against_teacher_forcing(path: Path, wanted: list[Any]) -> list[Sampled]:
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
    return done


@pytest.mark.parametrize("name", FAMILIES)
async def test_records_are_those_of_teacher_forcing(tmp_path: Path, name: str) -> None:
    await check_against_teacher_forcing(write(tmp_path, *FAMILIES[name]), mixed_requests(8))


async def test_a_long_prompt_is_processed_in_pieces(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, hidden=32, layers=2, experts=8, top_k=2, context=4096)
    prompt = [(7 * i) % 500 for i in range(2500)]
    await check_against_teacher_forcing(
        path, [request(input_ids=prompt, max_new_tokens=8), request(max_new_tokens=40)]
    )


SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, {**fields, "max_position_embeddings": 2048})
    for name, (family, fields) in FAMILIES.items()
    if "sliding_window" in fields
}


@pytest.mark.parametrize("name", SLIDING)
async def test_a_window_slides_over_pieces(tmp_path: Path, name: str) -> None:
    prompt = [(7 * i) % 250 + 3 for i in range(PIECE + 300)]
    await check_against_teacher_forcing(
        write(tmp_path, *SLIDING[name]),
        [request(input_ids=prompt, max_new_tokens=8), request(max_new_tokens=20)],
    )


async def test_states_go_on_over_pieces(tmp_path: Path) -> None:
    tiny("qwen3_next", max_position_embeddings=1024).save_pretrained(tmp_path)
    prompt = [(7 * i) % (VOCAB - 3) + 3 for i in range(PIECE + 90)]
    short = request(input_ids=[5, 6, 7], max_new_tokens=20)
    await check_against_teacher_forcing(
        tmp_path, [request(input_ids=prompt, max_new_tokens=8), short]
    )


# Every family of transformers, tiny.

REFUSED = {
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), "got indexed_attention"),
    **dict.fromkeys(UNRECORDABLE, "routed experts cannot be recorded"),
    "bailing_hybrid": "this engine cannot run it",
    "deepseek_v4": "got heavily_compressed_attention",
    "minimax": "got full_attention, linear_attention",
    "nemotron_h": "got dummy",
}
SERVED = sorted(ALL_FAMILIES.keys() - REFUSED)


@dataclass(frozen=True)
class Served:
    """One family's checkpoint, an engine on it, and the plain model beside it.

    ``spare`` has engines with other arguments that a test left as it found them.
    """

    path: Path
    engine: TransformersEngine
    plain: PlainModel
    spare: dict[str, Engine] = field(default_factory=dict)

    def take(self, **overrides: Any) -> tuple[str, Engine]:
        named = repr(sorted(overrides.items()))
        return named, self.spare.pop(named, None) or load(self.path, **overrides)

    async def give_back(self, named: str, engine: Engine) -> None:
        try:
            engine.check_health()
        except EngineUnavailable:
            return
        await engine.abort()
        if engine.sleep_level is None and engine.weight_version == 0:
            self.spare[named] = engine
        else:
            await engine.stop()

    async def stop(self) -> None:
        for engine in (self.engine, *self.spare.values()):
            await engine.stop()


@pytest.fixture(scope="module", params=SERVED)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp(request.param)
    length = "max_seq_len" if request.param == "dbrx" else "max_position_embeddings"
    tiny(request.param, vocab_size=260, **{length: 2048}).save_pretrained(path)
    write_tokenizer(path)
    served = Served(path, load(path), PlainModel(path, torch.float32))
    yield served
    asyncio.run(served.stop())


class TestEveryFamily(EngineContract):
    """The whole contract on each of them, as on the first."""

    @pytest.fixture
    def engine(self, family: Served) -> Engine:
        return family.engine

    @pytest.fixture
    def reference(self, family: Served) -> PlainModel:
        return family.plain

    @pytest.fixture
    async def make_engine(self, family: Served) -> AsyncIterator[MakeEngine]:
        made: list[tuple[str, Engine]] = []

        def make(**overrides: Any) -> Engine:
            made.append(family.take(**overrides))
            return made[-1][1]

        yield make
        for named, engine in made:
            await family.give_back(named, engine)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_served_is_refused_by_name(tmp_path: Path, family: str) -> None:
    tiny(family).save_pretrained(tmp_path)
    with pytest.raises((ValueError, EngineError), match=f"^{family}: .*{REFUSED[family]}"):
        load(tmp_path)
