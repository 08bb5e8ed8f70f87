"""One context serves one forward pass of one model, and leaves it as it was."""

import pytest
import torch

from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import TOKENS, checkpoint_layers, instance_state, random_tokens, run
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_context_serves_one_forward() -> None:
    model = tiny("qwen3_moe")
    with replay_routing(model, batch_of(model, random_ids(model))):
        model(random_tokens(), use_cache=False)
        with pytest.raises(ReplayError, match="layer 0 used its routes already"):
            model(random_tokens(), use_cache=False)


def test_contexts_do_not_nest() -> None:
    model = tiny("qwen3_moe")
    batch = batch_of(model, random_ids(model))
    with replay_routing(model, batch):
        with (
            pytest.raises(ReplayError, match="does not nest"),
            replay_routing(model, batch),
        ):
            pass
        model(random_tokens(), use_cache=False)


def test_contexts_of_two_models_do_not_meet() -> None:
    one, two = tiny("qwen3_moe"), tiny("qwen3_moe", seed=1)
    ids = random_ids(one)
    with replay_routing(one, batch_of(one, ids)), replay_routing(two, batch_of(two, ids)):
        assert torch.equal(run(one, random_tokens()).ids, ids.long())
        assert torch.equal(run(two, random_tokens()).ids, ids.long())


def test_layers_that_used_no_routes_are_named() -> None:
    model = tiny("qwen3_moe")
    with (
        pytest.raises(ReplayError, match=r"expected all 3 .* layers \[1, 2\] did not"),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        model.model.layers[0].mlp(torch.zeros(1, TOKENS, 32))


def test_an_exception_in_flight_is_not_masked() -> None:
    model = tiny("qwen3_moe")
    before = instance_state(model)
    with (
        pytest.raises(KeyError, match="loss"),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        raise KeyError("loss")
    assert instance_state(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx", "gemma4_text"])
def test_the_model_is_as_it_was(family: str, checkpointing: bool) -> None:
    model = tiny(family)
    if checkpointing:
        checkpoint_layers(model, use_reentrant=False)
    native = run(model, random_tokens())
    before = instance_state(model)
    with replay_routing(model, batch_of(model, random_ids(model))):
        assert instance_state(model) != before
        model(random_tokens(), use_cache=False)
    assert instance_state(model) == before
    with (
        pytest.raises(ReplayError, match="24 token rows, the forward pass has 12"),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        model(random_tokens(12), use_cache=False)
    assert instance_state(model) == before
    assert run(model, random_tokens()).same_bits(native)


def test_a_router_that_takes_no_top_k_is_noticed() -> None:
    model = tiny("qwen3_moe")
    gate = model.model.layers[1].mlp.gate

    def sort_instead(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden @ gate.weight.T
        values, ids = logits.sort(dim=-1, descending=True)
        return logits, values[:, :2], ids[:, :2]

    gate.forward = sort_instead
    message = "router of layer 1 was expected to take a top-2 over 8 experts, and did not"
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        model(random_tokens(), use_cache=False)
    assert gate.forward is sort_instead
