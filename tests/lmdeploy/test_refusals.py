"""What is refused early and in words, and rows that this CPU's operators cannot make."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.shared_store import puts_itself, wait_for_shared_store
from serve_app.engines.base import ModelInfo
from serve_app.engines.lmdeploy.model import read_model
from serve_app.engines.lmdeploy.options import check_machine, engine_config, split_options
from serve_app.engines.lmdeploy.probe import check_routes
from serve_app.engines.lmdeploy.sampling import LogitRules, generation_config
from serve_app.errors import EngineUnavailable
from serve_app.records import make_record
from serve_app.serve_options import ServeOptions
from serve_app.types import GenerateRequest
from tests.lmdeploy.conftest import load

DENSE_FIRST = ModelInfo("GlmMoeDsaForCausalLM", 4, (2, 3), 16, 2, 100, 100)


def checkpoint(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def args(path: Path, **fields: Any) -> EngineArgs:
    return EngineArgs(
        backend="lmdeploy", model=str(path), enable_return_routed_experts=True, **fields
    )


# Models.


@pytest.mark.parametrize(
    ("family", "because"),
    [("LlamaForCausalLM", ""), ("SDARMoeForCausalLM", ", since it denoises blocks of tokens.*")],
)
def test_a_family_without_routes_is_refused_by_name(
    sparse: Path, tmp_path: Path, family: str, because: str
) -> None:
    path = checkpoint(sparse, tmp_path / "other", architectures=[family])
    told = f"no routed experts for {family}{because}: expected one of .*Qwen"
    with pytest.raises(ValueError, match=told):
        load(path)
    off = args(path).model_copy(update={"enable_return_routed_experts": False})
    assert read_model(off).info.moe_layers == ()


@pytest.mark.parametrize(
    ("family", "extra", "layers"),
    [
        ("GlmMoeDsaForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 16}, (1, 2)),
        ("KimiK25ForConditionalGeneration", {"first_k_dense_replace": 2}, (2,)),
        ("GptOssForCausalLM", {}, (0, 1, 2)),
    ],
)
def test_the_layer_map_is_the_familys(
    sparse: Path, tmp_path: Path, family: str, extra: dict[str, Any], layers: tuple[int, ...]
) -> None:
    path = checkpoint(sparse, tmp_path / "other", architectures=[family], **extra)
    info = read_model(args(path)).info
    assert (info.moe_layers, info.num_experts, info.top_k) == (layers, 16, 4)


# Options.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"blocksize": 16}, r"expected some of \[.*'block_size'.*\], got \['blocksize'\]"),
        ({"session_len": 9}, "set engine.context_length instead of session_len"),
        ({"kv_transfer_config": {}}, "kv_transfer_config cannot be set here: a cache outside"),
        ({"dp_rank": 1}, "dp_rank cannot be set here: the ranks of a group are numbered here"),
        ({"distributed_executor_backend": "mp"}, "must be 'ray', or 'uni'"),
        ({"block_size": 15}, "LMDeploy refuses them: kernel_block_size must be"),
        ({"transfer": "theirs"}, "'ours' or 'lmdeploy'"),
    ],
)
def test_engine_kwargs_are_checked_by_name(
    sparse: Path, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine_config(args(sparse), split_options(kwargs), 100)


def test_float32_is_refused(sparse: Path) -> None:
    with pytest.raises(ValueError, match="bfloat16 or float16: expected one of them, got float32"):
        engine_config(args(sparse, dtype="float32"), split_options({}), 100)


def test_the_executor_is_set_explicitly(sparse: Path) -> None:
    one = engine_config(args(sparse), split_options({}), 100)
    sizes = {"tp": 4}
    four = engine_config(args(sparse, engine_kwargs=sizes), split_options(sizes), 100)
    uni = sizes | {"distributed_executor_backend": "uni"}
    with pytest.raises(ValueError, match="'uni' for one GPU, got 'uni' for 4"):
        engine_config(args(sparse, engine_kwargs=uni), split_options(uni), 100)
    rank = {"dp": 4, "ep": 8}
    third = engine_config(args(sparse, engine_kwargs=rank), split_options(rank), 100, dp_rank=2)
    assert (third.dp, third.ep, third.dp_rank) == (4, 8, 2)
    assert (one.distributed_executor_backend, four.distributed_executor_backend) == ("uni", "ray")
    assert (one.logprobs_mode, one.session_len, one.enable_transfer_obj_ref) == (
        "raw_logprobs",
        100,
        False,
    )


def test_a_machine_without_a_gpu_is_one_sentence(sparse: Path) -> None:
    before, torch.cuda.device_count = torch.cuda.device_count, lambda: 0
    try:
        with pytest.raises(ValueError, match="needs a CUDA GPU and this process sees none"):
            load(sparse)
        two = {"tp": 2}
        check_machine(engine_config(args(sparse, engine_kwargs=two), split_options(two), 100))
    finally:
        torch.cuda.device_count = before


def test_lmdeploys_own_puts_need_the_actor(sparse: Path) -> None:
    both = args(sparse, enable_transfer_obj_ref=True, engine_kwargs={"transfer": "lmdeploy"})
    assert puts_itself(both)
    assert not puts_itself(both.model_copy(update={"engine_kwargs": {}}))
    with pytest.raises(ValueError, match=r"expected store.compat_actors \[lmdeploy\], got \[\]"):
        wait_for_shared_store("app", StoreArgs())


# Routes.


def routes(**columns: int) -> Any:
    ids = np.array([[[1, 3], [2, 1], [5, 9], [0, 15]]] * 5, np.uint16)
    for name, value in columns.items():
        ids[:, int(name[1:])] = value
    return ids


@pytest.mark.parametrize("nothing", [0xFFFF, 0])
def test_sentinels_become_the_layer_map(nothing: int) -> None:
    ids = routes(c0=nothing, c1=nothing)
    check_routes(ids, 5, DENSE_FIRST)
    record = make_record(ids, num_experts=16, moe_layers=(2, 3))
    assert record.ids.dtype == np.uint8
    assert not record.ids[:, :2].any()
    assert (record.ids[:, 2:] == ids[:, 2:]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "got none"),
        (routes(c0=0, c1=0)[:4], r"expected integers \[5, 4, 2\], got uint16\[4, 4, 2\]"),
        (routes(c0=0, c1=0).astype(float), "got float64"),
        (routes(c0=0, c1=0, c3=0xFFFF), "expected experts below 16, got 65535"),
        (routes(c0=0, c1=0, c2=7), "the same expert twice"),
        (routes(c0=0, c1=3), "layer 1 should have no experts, got some"),
    ],
)
def test_wrong_routes_fail_the_probe_in_words(rows: Any, message: str) -> None:
    with pytest.raises(EngineUnavailable, match=f"GlmMoeDsaForCausalLM: the probe.*{message}"):
        check_routes(rows, 5, DENSE_FIRST)


# Sampling.


def config(**fields: Any) -> Any:
    request = GenerateRequest(input_ids=[1, 2], **fields)
    return generation_config(request, stop_ids={7, 5}, max_new_tokens=9, routes=True, padding=0)


def test_lmdeploys_defaults_are_never_met() -> None:
    greedy = config(temperature=0, top_p=0.5, ignore_eos=True)
    assert (greedy.do_sample, greedy.top_k, greedy.top_p, greedy.temperature) == (True, 1, 1, 1)
    assert (greedy.ignore_eos, greedy.stop_token_ids) == (False, [5, 7])
    sampled = config(temperature=0.7, top_k=0, min_p=0.1, seed=3)
    assert (sampled.do_sample, sampled.top_k, sampled.min_p) == (True, 0, 0.1)
    assert (sampled.random_seed, sampled.logits_processors) == (3, None)


def test_penalties_know_prompt_output_and_padding() -> None:
    rules = LogitRules((4, 5), padding=0, repetition=2.0, presence=1.0, frequency=0.5)
    row = torch.tensor([0, 0, 4, 5, 6, 6, 0, 7])
    changed = rules(row, torch.tensor([1.0, 1, 1, 1, 1, -1, 1, 1]))
    assert changed.tolist() == [1, 1, 1, 1, 0.5, -2, 0.5 - 1 - 1, 0.5 - 1 - 0.5]


# Preemption, on constructed rows.


def test_rows_that_were_sampled_from_win_over_computed_ones() -> None:
    from lmdeploy.pytorch.messages import MessageStatus, SamplingParam

    from serve_app.engines.lmdeploy.sequence import KeepingSequence

    session: Any = SimpleNamespace(seq_meta=SimpleNamespace(block_size=16, use_mrope=False))
    sequence = KeepingSequence(
        seq_id=0, session=session, sampling_param=SamplingParam(return_routed_experts=True)
    )
    state = SimpleNamespace(status=MessageStatus.WAITING)
    sequence.set_state(state)

    def rows(first: int, count: int) -> Any:
        return np.arange(first, first + count, dtype=np.uint16)[:, None, None]

    sequence.append_routed_experts(rows(0, 10))
    sequence.set_step(0)  # nothing was sampled yet: these are only computed again
    assert (sequence.kept, sequence.recomputed) == (None, 0)
    sequence.append_routed_experts(rows(0, 10))
    sequence.num_new_tokens = 3
    sequence.set_step(0)
    sequence.append_routed_experts(rows(100, 4))
    sequence.set_step(0)  # once more, in the middle
    sequence.append_routed_experts(rows(200, 12))
    assert sequence.all_routed_experts.get_real()[:, 0, 0].tolist() == [*range(10), 210, 211]
    assert (sequence.kept, sequence.recomputed) == (None, 2)
    state.status = MessageStatus.STOPPED
    sequence.set_step(0)
    assert sequence.kept is None


# Placement of tensor-parallel workers.


def test_bundles_reserve_the_replica_and_its_workers() -> None:
    bundles = [{"CPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}]
    options = ServeOptions.model_validate({"num_cpus": 1, "placement_group_bundles": bundles})
    assert options.gpus_per_replica == 2
    deployment = options.deployment()
    assert deployment["placement_group_bundles"] == bundles
    assert deployment["placement_group_strategy"] == "STRICT_PACK"
    assert "placement_group_bundles" not in ServeOptions().deployment()
    many = {"num_cpus": 1, "placement_group_bundles": [*bundles, *bundles * 4]}
    assert ServeOptions.model_validate(many).deployment()["placement_group_strategy"] == "PACK"
    for wrong in ({"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1}):
        with pytest.raises(ValueError, match="the first of placement_group_bundles is the replica"):
            ServeOptions.model_validate({**wrong, "placement_group_bundles": bundles})
