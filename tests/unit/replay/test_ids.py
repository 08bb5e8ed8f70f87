"""Expert ids: any integer type, any number of experts, and they decide what comes out."""

import pytest
import torch

from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import TOKENS, random_tokens, run
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_every_id_dtype_replays_alike(dtype: torch.dtype) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)):
        expected = run(model, random_tokens())
    with replay_routing(model, batch_of(model, ids.to(dtype))):
        assert run(model, random_tokens()).same_bits(expected)


def test_more_than_256_experts() -> None:
    model = tiny("qwen3_moe", num_experts=300)
    native = run(model, random_tokens())
    assert int(native.ids.max()) > 255
    with replay_routing(model, batch_of(model, native.ids.to(torch.uint16))):
        assert run(model, random_tokens()).same_bits(native)


def test_dense_layers_between() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0, 3])
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)):
        moe_only = run(model, random_tokens())
    assert torch.equal(moe_only.ids, ids.long())
    all_layers = torch.full((TOKENS, 5, 2), 255, dtype=torch.uint8)
    all_layers[:, [1, 2, 4]] = ids
    with replay_routing(model, batch_of(model, all_layers)):
        assert run(model, random_tokens()).same_bits(moe_only)


def test_routing_matters() -> None:
    model = tiny("qwen3_moe")
    native = run(model, random_tokens())
    with replay_routing(model, batch_of(model, random_ids(model))):
        forced = run(model, random_tokens())
    assert float((native.logits - forced.logits).abs().max()) > 0.1
