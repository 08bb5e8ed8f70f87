"""A checkpoint that the user puts around the model: its recomputation has its own routes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed._composable.checkpoint_activation import checkpoint as composable
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import (
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
Grads = dict[str, torch.Tensor | None]


class Foreign(torch.autograd.Function):
    """A reentrant checkpoint of somebody else's."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], embeds: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(embeds)
        with torch.no_grad():
            result: torch.Tensor = function(embeds)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (embeds,) = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            logits = ctx.function(embeds)
        torch.autograd.backward(logits, grads[0])
        return None, embeds.grad


foreign: Any = Foreign.apply


def embeds_of(model: Any) -> torch.Tensor:
    embeds: torch.Tensor = model.get_input_embeddings()(random_tokens())
    return embeds


def logits_of(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(inputs_embeds=embeds, use_cache=False).logits
    return logits


def checkpointed(model: Any, *, use_reentrant: bool) -> torch.Tensor:
    result: Any = checkpoint(
        partial(logits_of, model), embeds_of(model), use_reentrant=use_reentrant
    )
    assert isinstance(result, torch.Tensor)
    return result


def grads_after(model: Any, ids: torch.Tensor, forward: Callable[[], torch.Tensor]) -> Grads:
    model.zero_grad()
    with replay_routing(model, batch_of(model, ids)):
        logits = forward()
    loss_of(logits).backward()
    return grads_of(model)


def plain_grads(model: Any, ids: torch.Tensor) -> Grads:
    return grads_after(model, ids, lambda: logits_of(model, embeds_of(model)))


# A reentrant checkpoint within one is run without gradients first.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("layers", [None, *REENTRANT])
@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text", "dbrx"])
def test_around_the_whole_model_changes_no_bit(
    family: str, use_reentrant: bool, layers: bool | None
) -> None:
    """Also with checkpoints in it that the recomputation makes anew."""
    model = tiny(family)
    ids = random_ids(model)
    plain = plain_grads(model, ids)
    if layers is not None:
        checkpoint_layers(model, use_reentrant=layers)
    before = instance_state(model)
    whole = grads_after(model, ids, lambda: checkpointed(model, use_reentrant=use_reentrant))
    assert same_grads(plain, whole)
    assert instance_state(model) == before


@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("part", ["mlp", "gate"])
def test_around_a_part_changes_no_bit(part: str, use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = plain_grads(model, ids)
    for layer in model.model.layers:
        module = layer.mlp if part == "mlp" else layer.mlp.gate
        module.forward = partial(checkpoint, module.forward, use_reentrant=use_reentrant)
    assert same_grads(plain, plain_grads(model, ids))


def test_torchs_composable_checkpoint_changes_no_bit() -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = plain_grads(model, ids)
    for layer in model.model.layers:
        composable(layer)
    assert same_grads(plain, plain_grads(model, ids))


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_what_comes_between_forward_and_backward_is_not_touched(use_reentrant: bool) -> None:
    """An evaluation, a native pass with its own graph, and the next step's context."""
    model = tiny("qwen3_moe")
    first, second = random_ids(model, seed=1), random_ids(model, seed=2)

    def all_of_it(forward: Callable[[], torch.Tensor]) -> tuple[Grads, list[torch.Tensor]]:
        model.zero_grad()
        with replay_routing(model, batch_of(model, first)):
            one = forward()
        with torch.no_grad():
            evaluated = logits_of(model, embeds_of(model))
        native = forward()
        with replay_routing(model, batch_of(model, second)):
            two = forward()
            loss_of(one).backward()
        loss_of(native).backward()
        loss_of(two).backward()
        return grads_of(model), [evaluated, native.detach(), two.detach()]

    plain, seen = all_of_it(lambda: logits_of(model, embeds_of(model)))
    grads, seen_again = all_of_it(lambda: checkpointed(model, use_reentrant=use_reentrant))
    assert all(torch.equal(*pair) for pair in zip(seen, seen_again, strict=True))
    for name, grad in plain.items():
        torch.testing.assert_close(grads[name], grad)  # summed in another order


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_the_context_may_be_inside_what_is_checkpointed(use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = plain_grads(model, ids)

    def replayed(embeds: torch.Tensor) -> torch.Tensor:
        with replay_routing(model, batch_of(model, ids)):
            return logits_of(model, embeds)

    model.zero_grad()
    loss_of(checkpoint(replayed, embeds_of(model), use_reentrant=use_reentrant)).backward()
    assert same_grads(plain, grads_of(model))


def test_a_checkpoint_of_somebody_elses_is_refused_before_it_goes_wrong() -> None:
    model = tiny("qwen3_moe")
    message = "layer 0 runs in Foreign, an autograd.Function that may run it again in backward"
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        foreign(partial(logits_of, model), embeds_of(model))


def test_a_checkpoint_of_somebody_elses_that_the_model_holds_changes_no_bit() -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = plain_grads(model, ids)
    checkpoint_layers(model, use_reentrant=True)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = foreign
    assert same_grads(plain, plain_grads(model, ids))


def test_a_checkpoint_of_somebody_elses_that_nothing_learns_through_is_fine() -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    with torch.no_grad(), replay_routing(model, batch_of(model, ids)):
        plain = logits_of(model, embeds_of(model))
    with torch.no_grad(), replay_routing(model, batch_of(model, ids)):
        logits = foreign(partial(logits_of, model), embeds_of(model))
    assert torch.equal(plain, logits)


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_a_native_recomputation_inside_a_context_is_refused(use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    native = checkpointed(model, use_reentrant=use_reentrant)
    message = "runs again in backward, for a forward pass that was not this context's"
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        loss_of(native).backward()


def test_torch_is_left_as_it_was_in_whatever_order_contexts_end() -> None:
    one, two = tiny("qwen3_moe"), tiny("qwen3_moe", seed=1)
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    first = replay_routing(one, batch_of(one, random_ids(one)))
    second = replay_routing(two, batch_of(two, random_ids(two)))
    first.__enter__()
    second.__enter__()
    assert "apply" in vars(CheckpointFunction)
    logits = checkpointed(one, use_reentrant=True)
    first.__exit__(None, None, None)
    other = checkpointed(two, use_reentrant=False)
    second.__exit__(None, None, None)
    assert "apply" not in vars(CheckpointFunction)
    assert torch.utils.checkpoint._checkpoint_without_reentrant_generator is generator
    loss_of(logits).backward()
    loss_of(other).backward()
    assert same_grads(plain_grads(two, random_ids(two)), grads_of(two))
