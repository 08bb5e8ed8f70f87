"""Gradient checkpointing: what runs a second time in backward gets the same routes."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import (
    Pass,
    checkpoint_layers,
    grads_of,
    instance_state,
    loss_of,
    random_tokens,
    same_grads,
)
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

REENTRANT = [pytest.param(True, id="reentrant"), pytest.param(False, id="non-reentrant")]


def replayed_grads(model: Any, ids: torch.Tensor, *, inside: bool) -> Pass:
    model.zero_grad()
    with replay_routing(model, batch_of(model, ids)):
        logits = model(random_tokens(), use_cache=False).logits
        if inside:
            loss_of(logits).backward()
    if not inside:
        loss_of(logits).backward()
    return Pass(logits.detach(), grads_of(model), ids)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text", "deepseek_v2", "longcat_flash"])
def test_checkpointing_changes_no_bit(family: str, use_reentrant: bool, inside: bool) -> None:
    model = tiny(family)
    ids = random_ids(model)
    plain = replayed_grads(model, ids, inside=inside)
    checkpoint_layers(model, use_reentrant=use_reentrant)
    before = instance_state(model)
    assert plain.same_bits(replayed_grads(model, ids, inside=inside))
    assert instance_state(model) == before


@pytest.mark.parametrize("implementation", CheckpointImpl)
def test_checkpoint_wrapper_changes_no_bit(implementation: CheckpointImpl) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = replayed_grads(model, ids, inside=False)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, Qwen3MoeDecoderLayer),
    )
    wrapped = replayed_grads(model, ids, inside=False)
    wrapped.grads = {
        name.replace("_checkpoint_wrapped_module.", ""): grad
        for name, grad in wrapped.grads.items()
    }
    assert plain.same_bits(wrapped)


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_each_backward_replays_the_routes_of_its_own_forward(use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    first, second = random_ids(model, seed=1), random_ids(model, seed=2)

    def sum_of_both() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        with replay_routing(model, batch_of(model, first)):
            one = model(random_tokens(), use_cache=False).logits
        with replay_routing(model, batch_of(model, second)):
            two = model(random_tokens(), use_cache=False).logits
            loss_of(one).backward()
        native = model(random_tokens(), use_cache=False).logits
        loss_of(two).backward()
        loss_of(native).backward()
        return grads_of(model)

    plain = sum_of_both()
    checkpoint_layers(model, use_reentrant=use_reentrant)
    assert same_grads(plain, sum_of_both())


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_backward_in_another_thread_and_twice(use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = replayed_grads(model, ids, inside=True)
    checkpoint_layers(model, use_reentrant=use_reentrant)
    before = instance_state(model)
    with replay_routing(model, batch_of(model, ids)):
        loss = loss_of(model(random_tokens(), use_cache=False).logits)
    for _ in range(2):
        model.zero_grad()
        thread = threading.Thread(target=lambda: loss.backward(retain_graph=True))
        thread.start()
        thread.join()
        assert same_grads(plain.grads, grads_of(model))
    assert instance_state(model) == before
