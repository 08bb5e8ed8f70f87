"""Routes of MoE blocks of LMDeploy's that no model on a CPU runs, on constructed inputs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.lmdeploy.moe_blocks import (
    ARGUMENT,
    CONFIG,
    EXPERTS,
    HIDDEN,
    LAYERS,
    TOKENS,
    TOP_K,
    Around,
    HandingNone,
    HandingTokens,
    deepseek,
    deepseek_1,
    deepseek_v2_in_groups,
    deepseek_v4,
    deepseek_v32,
    llama4,
    mixtral,
    qwen3_omni,
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        yield


def passed(model: nn.Module, tokens: int = TOKENS) -> Any:
    return model(input_ids=torch.arange(tokens)[None])


def given(model: Around) -> list[torch.Tensor]:
    """Note what every experts module is called with, from outside the hooks."""
    found: list[torch.Tensor] = []
    for block in model.blocks:
        if (experts := getattr(block, "experts", None)) is not None:
            experts.forward = noting(experts.forward, found)
    return found


def noting(plain: Any, found: list[torch.Tensor]) -> Any:
    def forward(hidden: Any, weights: Any, ids: Any) -> Any:
        found.append(ids.reshape(TOKENS, -1).clone())
        return plain(hidden, weights, ids)

    return forward


@pytest.mark.parametrize(
    ("build", "around"),
    [
        (deepseek_1, Around),
        (deepseek_v2_in_groups, Around),
        (deepseek_v32, Around),
        (deepseek_v4, HandingTokens),
        (llama4, Around),
        (qwen3_omni, HandingNone),
    ],
)
def test_what_experts_are_given_is_recorded(build: Any, around: type[Around]) -> None:
    from serve_app.engines.lmdeploy.capture.recording import record

    model = around(None, build(1), None, build(3))
    plain = passed(model)
    used = given(model)
    assert record(model, LAYERS, TOP_K) == 2
    output = passed(model)
    rows = output[ARGUMENT]
    assert (rows.dtype, rows.shape) == (torch.uint16, (TOKENS, LAYERS, TOP_K))
    torch.testing.assert_close(output["hidden_states"], plain)
    assert [rows[:, layer].tolist() for layer in (1, 3)] == [ids.tolist() for ids in used]
    assert all(len(set(ids)) == TOP_K for layer in (1, 3) for ids in rows[:, layer].tolist())
    assert not rows[:, [0, 2]].to(torch.int32).any()


def test_a_hash_routed_layer_is_recorded_by_token() -> None:
    from serve_app.engines.lmdeploy.capture.recording import record

    block = deepseek_v4(0)
    model = HandingTokens(block, None, None, None)
    block.gate.tid2eid.copy_(torch.arange(50)[:, None] % 7 + torch.tensor([0, 1]))
    record(model, LAYERS, TOP_K)
    assert passed(model)[ARGUMENT][:, 0].tolist() == [[n, n + 1] for n in range(TOKENS)]


def test_physical_experts_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy.pytorch.nn.eplb import EPLBManager

    from serve_app.engines.lmdeploy.capture.recording import record

    def moved(ids: torch.Tensor, info: object) -> torch.Tensor:
        return (ids + 1) % EXPERTS

    monkeypatch.setattr(EPLBManager, "topk_ids_logical_to_physical", staticmethod(moved))
    block = deepseek(1)
    block.gate.eplb_dispatch_info = object()
    model = Around(None, block, None, None)
    used = given(model)
    record(model, LAYERS, TOP_K)
    rows = passed(model)[ARGUMENT][:, 1].to(torch.int64)
    assert torch.equal(moved(rows, None), used[0])


@pytest.mark.parametrize("build", [deepseek_v32, mixtral])
def test_a_replay_of_captured_kernels_needs_no_python(build: Any) -> None:
    """As a CUDA graph does: the operations of one pass, on the same memory, for other tokens."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from serve_app.engines.lmdeploy.capture.recording import record

    block = build(1)
    model = Around(None, block, None, None)
    record(model, LAYERS, TOP_K)
    block.experts.forward = lambda hidden, weights, ids: hidden * weights.sum(-1, keepdim=True)

    def rows(ids: torch.Tensor) -> Any:
        return model(input_ids=ids)[ARGUMENT]

    first, second = torch.arange(TOKENS)[None], torch.arange(TOKENS)[None] + 20
    with torch.inference_mode(False), torch.no_grad():
        captured = make_fx(rows)(first)
        assert not torch.equal(rows(first), rows(second))
        assert torch.equal(captured(second), rows(second))


def test_every_pass_has_rows_of_its_own_and_a_failed_one_leaves_none() -> None:
    from serve_app.engines.lmdeploy.capture.recording import record

    block = mixtral(1)
    model = Around(None, block, None, None)
    record(model, LAYERS, TOP_K)
    first = passed(model)[ARGUMENT]
    kept = first.clone()
    assert passed(model, 3)[ARGUMENT].shape[0] == 3
    assert torch.equal(first, kept)
    block(torch.zeros(1, 2, HIDDEN))  # outside a pass it is what it was
    block.experts.forward = None
    with pytest.raises(TypeError):
        passed(model)
    del block.experts.forward
    block(torch.zeros(1, 2, HIDDEN))
    assert torch.equal(passed(model)[ARGUMENT], kept)


def test_rows_that_do_not_fit_are_an_error() -> None:
    from serve_app.engines.lmdeploy.capture.step import Step

    step = Step(LAYERS, TOP_K)
    step.begin(torch.arange(4)[None])
    for shape in ((2, TOP_K), (1, TOP_K), (4, 1), (4, 4)):
        with pytest.raises(RuntimeError, match="shape"):
            step.write(0, torch.zeros(shape, dtype=torch.int64))


def test_microbatches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy.pytorch.distributed import get_dist_manager

    from serve_app.engines.lmdeploy.capture.recording import record

    monkeypatch.setattr(get_dist_manager().current_config(), "enable_microbatch", True)
    with pytest.raises(ValueError, match=r"Around: .* not recorded with enable_microbatch"):
        record(Around(deepseek(0), None, None, None), LAYERS, TOP_K)
    assert record(Around(None, None, None, None), LAYERS, TOP_K) == 0


def test_models_that_return_their_routes_are_left_alone() -> None:
    from serve_app.engines.lmdeploy.capture.recording import records_itself

    model: Any = Around(deepseek(0), None, None, None)
    assert not records_itself(model)
    model.layers[0].enable_return_routed_experts = True  # as the language model in InternVL
    assert records_itself(model)


def test_a_dense_layer_of_qwen3_moe_leaves_zeros_in_its_column() -> None:
    from lmdeploy.pytorch.models.qwen3_moe import Qwen3MoeMLP

    from serve_app.engines.lmdeploy.capture.dense import mend_dense_layers

    dense = Qwen3MoeMLP(CONFIG, intermediate_size=8)
    model = HandingNone(None, dense, None, None)
    with pytest.raises(TypeError, match=ARGUMENT):
        passed(model)
    mend_dense_layers(model)
    passed(model)
    rows = torch.full((TOKENS, LAYERS, TOP_K), 7, dtype=torch.uint16)
    dense(torch.zeros(1, TOKENS, HIDDEN), all_routed_experts=rows)
    assert not rows[:, 1].to(torch.int32).any()
    assert (rows[:, [0, 2, 3]].to(torch.int32) == 7).all()
