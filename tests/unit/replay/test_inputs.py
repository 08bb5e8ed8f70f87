"""What a model is called with is held against the batch: padding, packing, where rows begin."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from serve_app.types import ExpertBatch
from tests.families import COMMON, EXPERTS, tiny
from tests.unit.replay.passes import TOKENS, random_tokens
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

RESTARTING = torch.cat([torch.arange(10), torch.arange(14)])[None]
GOING_ON = torch.arange(TOKENS)[None]


def two_sequences(model: Any, **changes: Any) -> ExpertBatch:
    return batch_of(model, random_ids(model), cu_seqlens=torch.tensor([0, 10, TOKENS]), **changes)


def two_padded_rows(model: Any, first: int) -> ExpertBatch:
    """Two sequences of a [2, 12] forward pass, the first right-padded."""
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, first:] = False
    cu_seqlens = torch.tensor([0, 12, TOKENS])
    return batch_of(model, random_ids(model), valid=valid.flatten(), cu_seqlens=cu_seqlens)


def left_padding(real: int) -> torch.Tensor:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, : 12 - real] = 0
    return mask


@pytest.mark.parametrize(("routes", "tokens"), [(8, 8), (10, 11), (11, 11), (4, 8)])
def test_left_padded_tokens_with_right_padded_routes_are_refused(routes: int, tokens: int) -> None:
    """The last token's row may have no routes, and the routes may be longer than the padding."""
    model = tiny("qwen3_moe")
    message = r"row 0 of the batch has routes, but is padding .*\[2, 12\], at \[0, 0\]"
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, two_padded_rows(model, routes)),
    ):
        model(random_tokens().view(2, 12), attention_mask=left_padding(tokens), use_cache=False)


def test_left_padded_tokens_with_left_padded_routes_equal_one_by_one() -> None:
    model = tiny("qwen3_moe")
    tokens, ids, mask = random_tokens().view(2, 12), random_ids(model), left_padding(8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = batch_of(
        model, ids, valid=mask.bool().flatten(), cu_seqlens=torch.tensor([0, 12, TOKENS])
    )
    with replay_routing(model, batch), torch.no_grad():
        together = model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    with replay_routing(model, batch_of(model, ids[4:12])), torch.no_grad():
        alone = model(tokens[:1, 4:], use_cache=False).logits
    torch.testing.assert_close(together[:1, 4:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({}, "no position_ids for each token"),
        ({"position_ids": RESTARTING, "use_cache": None}, "use_cache on"),
        ({"position_ids": RESTARTING, "attention_mask": torch.ones(1, TOKENS)}, "a 2D attention"),
    ],
)
def test_a_row_that_is_taken_for_one_sequence_is_refused(
    inputs: dict[str, Any], found: str
) -> None:
    model = tiny("qwen3_moe")
    message = rf"sequences that begin within a row, at rows \[10\]: expected .*, found {found}"
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, two_sequences(model)),
    ):
        model(random_tokens(), **{"use_cache": False, **inputs})


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (
            GOING_ON,
            r"row 10: expected a sequence to begin there, .* found position_ids 9 and .* 10",
        ),
        (
            torch.cat([torch.arange(9), torch.arange(15)])[None],
            r"row 9: expected a sequence to go on there, .* found position_ids 8 and then 0",
        ),
    ],
)
def test_positions_that_restart_elsewhere_are_refused(
    positions: torch.Tensor, message: str
) -> None:
    model = tiny("qwen3_moe")
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, two_sequences(model)),
    ):
        model(random_tokens(), position_ids=positions, use_cache=False)


def test_padding_at_the_end_may_have_any_positions() -> None:
    """A sequence's own padding, and a sequence of nothing else."""
    model = tiny("qwen3_moe")
    valid = torch.ones(TOKENS, dtype=torch.bool)
    valid[8:10] = valid[20:] = False
    positions = RESTARTING.clone()
    positions[0, 8:10] = 0
    batch = two_sequences(model, valid=valid)
    batch.cu_seqlens.resize_(4)[2:] = torch.tensor([20, TOKENS])
    with replay_routing(model, batch):
        model(random_tokens(), position_ids=positions, use_cache=False)


def test_a_part_of_the_rows_is_not_held_against_the_boundaries_of_all() -> None:
    model = tiny("qwen3_moe")
    batch = two_sequences(model)
    batch.cu_seqlens.mul_(2)
    with replay_routing(model, batch):
        model(random_tokens(), use_cache=False)


def test_a_decoder_in_a_wrapper_and_one_of_a_vision_model_are_looked_at() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    wrapped = tiny("qwen3_moe")
    wrapped.model = Around(wrapped.model)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    auto_model: Any = AutoModelForImageTextToText
    vision = auto_model.from_config(
        Qwen3VLMoeConfig(
            text_config={**COMMON, **EXPERTS, "rope_parameters": rope},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        )
    )
    for model in (wrapped, vision):
        for inputs in ({}, {"position_ids": GOING_ON}):
            with (
                pytest.raises(ReplayError, match=r"sequences? (that|to) begin"),
                replay_routing(model, two_sequences(model)),
            ):
                model(random_tokens(), use_cache=False, **inputs)


def test_columns_say_which_layers_the_ids_are_of() -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)), torch.no_grad():
        expected = model(random_tokens(), use_cache=False).logits
    turned = batch_of(model, ids[:, [2, 0, 1]], columns=(2, 0, 1))
    with replay_routing(model, turned), torch.no_grad():
        assert torch.equal(model(random_tokens(), use_cache=False).logits, expected)
    for columns, message in (
        ((0, 1, 3), r"none of \[2\]"),
        ((0, 1), r"the layers \(0, 1\), got 3"),
    ):
        with (
            pytest.raises(ReplayError, match=message),
            replay_routing(model, batch_of(model, ids, columns=columns)),
        ):
            pass


def test_tokens_that_the_routes_were_not_captured_on_are_refused() -> None:
    model = tiny("qwen3_moe")
    tokens = random_tokens()
    captured = tokens[0].to(torch.int32)
    captured[7] = -1
    batch = batch_of(model, random_ids(model), tokens=captured)
    with replay_routing(model, batch):
        model(tokens, use_cache=False)
    other = tokens.clone()
    other[0, 7] = other[0, 11] = 96 - tokens[0, 11]
    message = (
        rf"row 11: .* captured on token {int(tokens[0, 11])}, .* has {96 - tokens[0, 11]} there"
    )
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch):
        model(other, use_cache=False)
