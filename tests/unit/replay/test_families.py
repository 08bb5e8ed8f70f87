"""Every family replays its own routes and forced ones, or is refused by name."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from serve_app.engines.moe import MoeShape, find_moe_blocks, moe_shape
from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from tests.families import COMMON, REPLAYABLE, UNREPLAYABLE, tiny
from tests.unit.replay.passes import TOKENS, random_tokens, run
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", REPLAYABLE)
def test_own_ids_change_no_bit(family: str) -> None:
    model = tiny(family)
    native = run(model, random_tokens())
    with replay_routing(model, batch_of(model, native.ids.to(torch.uint8))):
        replayed = run(model, random_tokens())
    assert native.same_bits(replayed)


@pytest.mark.parametrize("family", REPLAYABLE)
def test_forced_ids_reach_the_experts_and_gradients_the_router(family: str) -> None:
    model = tiny(family)
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)):
        forced = run(model, random_tokens())
    assert torch.equal(forced.ids, ids.long())
    for block in find_moe_blocks(model):
        grads = [p.grad for p in block.router.parameters() if p.grad is not None]
        assert any(bool(grad.abs().sum() > 0) for grad in grads)
        assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("family", REPLAYABLE)
def test_invalid_rows_route_natively(family: str) -> None:
    model = tiny(family)
    native = run(model, random_tokens())
    garbage = torch.full_like(native.ids, 255).to(torch.uint8)
    nothing_valid = torch.zeros(TOKENS, dtype=torch.bool)
    with replay_routing(model, batch_of(model, garbage, valid=nothing_valid)):
        replayed = run(model, random_tokens())
    assert native.same_bits(replayed)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_valid_and_invalid_rows_side_by_side(family: str) -> None:
    model = tiny(family, num_hidden_layers=2)
    native = run(model, random_tokens())
    ids = random_ids(model)
    valid = torch.arange(TOKENS) % 3 != 0
    ids[~valid] = 255
    with replay_routing(model, batch_of(model, ids, valid=valid)):
        replayed = run(model, random_tokens())
    assert torch.equal(replayed.ids[valid], ids[valid].long())
    # What the first sparse layer is given does not depend on the forced rows yet.
    assert torch.equal(replayed.ids[~valid, 0], native.ids[~valid, 0])


@pytest.mark.parametrize("family", REPLAYABLE)
def test_ids_of_another_family_are_refused(family: str) -> None:
    """Qwen3-MoE has 8 experts in all 3 layers, DeepSeek-V3 in the last 2, LongCat 10 in 4."""

    def fits(one: MoeShape) -> tuple[object, ...]:
        return one.num_experts, one.moe_layers, one.top_k

    model = tiny(family)
    own = moe_shape(model)
    others = [tiny(name) for name in ("qwen3_moe", "deepseek_v3", "longcat_flash")]
    others = [other for other in others if fits(moe_shape(other)) != fits(own)]
    assert len(others) >= 2
    for other in others:
        batch = batch_of(other, random_ids(other))
        with (
            pytest.raises(ReplayError, match=rf"{own.family} has .*, the batch "),
            replay_routing(model, batch),
        ):
            model(random_tokens(), use_cache=False)


@pytest.mark.parametrize("family", UNREPLAYABLE)
def test_families_that_replay_would_falsify_are_refused(family: str) -> None:
    model = tiny(family)
    batch = batch_of(model, random_ids(model))
    with (
        pytest.raises(ReplayError, match=f"{family}: routes cannot be replayed"),
        replay_routing(model, batch),
    ):
        pass


def test_what_cannot_be_recorded_is_refused_for_replay_too() -> None:
    qwen = tiny("qwen3_moe")
    batch = batch_of(qwen, random_ids(qwen))
    with (
        pytest.raises(ReplayError, match="llama4_text: routed experts cannot be recorded"),
        replay_routing(tiny("llama4_text"), batch),
    ):
        pass
    dense = Qwen3ForCausalLM(Qwen3Config(**COMMON))
    with pytest.raises(ReplayError, match="qwen3 has no MoE layers"), replay_routing(dense, batch):
        pass
