"""Experts, routers and blocks in whatever wrappers: found, recorded, and replayed all the same."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
)

from serve_app.engines.moe import find_moe_blocks, moe_shape
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import Pass, grads_of, instance_state, loss_of, random_tokens, run
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


class Around(nn.Module):
    """Forwards to its one child, and to nothing else of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": Around,
    "twice": lambda module: Around(Around(module)),
    "reentrant": partial(CheckpointWrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
    "non-reentrant": partial(CheckpointWrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
    "around a checkpoint": lambda module: Around(CheckpointWrapper(module)),
}


def wrap(model: Any, name: str, wrapper: Callable[[nn.Module], nn.Module]) -> Any:
    """Wrap every child of the layers that is called ``name``."""
    for parent in list(model.model.layers.modules()):
        for child_name, child in list(parent.named_children()):
            if child_name == name:
                setattr(parent, child_name, wrapper(child))
    return model


def after(model: Any, ids: torch.Tensor) -> Pass:
    """Replay with the backward pass after the context; gradients by the names without wrappers."""
    model.zero_grad()
    with replay_routing(model, batch_of(model, ids)):
        logits = model(random_tokens(), use_cache=False).logits
    loss_of(logits).backward()
    return Pass(logits.detach(), dict(named_grads(model)), ids)


def named_grads(model: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    for name, grad in grads_of(model).items():
        yield name.replace("inner.", "").replace("_checkpoint_wrapped_module.", ""), grad


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("qwen3_moe", "experts"),
        ("qwen3_moe", "gate"),
        ("qwen3_moe", "mlp"),
        ("gemma4_text", "experts"),
        ("gemma4_text", "router"),
        ("dbrx", "router"),
    ],
)
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_changes_nothing(
    family: str, part: str, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    plain, wrapped = make(family), wrap(make(family), part, wrapper)
    ids = random_ids(plain)
    assert moe_shape(wrapped) == moe_shape(plain)
    before = instance_state(wrapped)
    expected, found = after(plain, ids), after(wrapped, ids)
    assert torch.equal(expected.logits, found.logits)
    # A reentrant checkpoint within a layer adds up its input's gradients in another order.
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-3, atol=1e-3)
    assert instance_state(wrapped) == before


def make(family: str) -> Any:
    model = tiny(family)
    if family == "dbrx":  # its layers are called blocks
        model.model = model.transformer
        model.model.layers = model.transformer.blocks
    return model


@pytest.mark.parametrize("part", ["experts", "gate", "mlp"])
def test_what_wrapped_experts_use_is_recorded_once(part: str) -> None:
    model = wrap(tiny("qwen3_moe"), part, WRAPPERS["reentrant"])
    ids = random_ids(model)
    recorder = ExpertRecorder(find_moe_blocks(model))
    with replay_routing(model, batch_of(model, ids)):
        with recorder.capture() as captured:
            loss = loss_of(model(random_tokens(), use_cache=False).logits)
        loss.backward()
    assert torch.equal(torch.from_numpy(captured.ids()), ids)


LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": (
        "qwen3_moe",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "router": ("qwen3_moe", {"target_parameters": ["mlp.gate.weight"]}),
    "both": (
        "gpt_oss",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.router.weight"]},
    ),
    "biases": ("gpt_oss", {"target_parameters": ["mlp.experts.gate_up_proj_bias"]}),
    "a linear in the router": ("gemma4_text", {"target_modules": ["router.proj", "q_proj"]}),
    "a router of its own": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    ),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", LORA)
def test_lora_is_looked_through(case: str) -> None:
    family, targets = LORA[case]
    base = tiny(family)
    shape, ids = moe_shape(base), random_ids(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **targets))
    assert moe_shape(model) == shape
    native = run(model, random_tokens())
    recorder = ExpertRecorder(find_moe_blocks(model))
    with replay_routing(model, batch_of(model, native.ids.to(torch.uint8))):
        assert native.same_bits(run(model, random_tokens()))
    with replay_routing(model, batch_of(model, ids)), recorder.capture() as captured:
        forced = run(model, random_tokens())
    assert torch.equal(forced.ids, ids.long())
    assert torch.equal(torch.from_numpy(captured.ids()), ids)
    trained = [grad for name, grad in forced.grads.items() if grad is not None]
    assert trained
    assert all(bool(grad.isfinite().all()) for grad in trained)


def test_a_wrapper_that_calls_its_experts_in_another_way_is_refused() -> None:
    class Swapping(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Any, weights: Any, ids: Any) -> Any:
            return self.inner(hidden, ids, weights)

    model = wrap(tiny("qwen3_moe"), "experts", Swapping)
    block = find_moe_blocks(model)[0]
    with pytest.raises(Exception, match=r"layer 0: Swapping was expected .* top_k_index \[tokens"):
        block.routed_ids((torch.zeros(4, 32), torch.zeros(4, 2), torch.zeros(4, 2).long()), {})
