"""From the calls of experts modules to a rollout's rows."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from serve_app.engines.transformers.expert_rows import PENDING, ExpertRows
from serve_app.engines.transformers.recording import Captured, convert
from serve_app.errors import EngineError
from serve_app.records import Ids
from tests.distinct_ids import distinct_ids

LAYERS = (1, 3)


def a_pass(tokens: int, seed: int = 0, experts: int = 8) -> tuple[Captured, Ids]:
    """Return a captured pass and the ids ``[tokens, 2, top_k]`` that went in."""
    ids = torch.from_numpy(distinct_ids((tokens, 2, 2), experts, seed))
    captured = Captured(LAYERS, experts)
    for position, layer in enumerate(LAYERS):
        captured.add(layer, ids[:, position])
    return captured, ids.numpy().astype(np.uint8)


def rows_of(passes: Sequence[tuple[Captured, slice, int]]) -> Ids:
    rows = ExpertRows(layers=4, moe_layers=LAYERS, top_k=2, num_experts=8, capacity=4)
    for captured, tokens, count in passes:
        rows.append(captured, tokens, count)
    return rows.first(rows.rows)


def test_passes_converted_together_are_each_their_own() -> None:
    passes = [a_pass(tokens, seed) for seed, tokens in enumerate((1, 5, 1, 3))]
    convert([captured for captured, _ in passes])
    for captured, expected in passes:
        assert captured.ids().dtype == np.uint8
        np.testing.assert_array_equal(captured.ids(), expected)


def test_what_is_changed_after_the_call_changes_no_record() -> None:
    captured = Captured(LAYERS, 8)
    ids = torch.tensor([[1, 2]])
    captured.add(1, ids)
    captured.add(3, ids)
    ids.fill_(7)
    assert captured.ids().tolist() == [[[1, 2], [1, 2]]]


def test_rows_of_many_steps_are_those_of_their_slots() -> None:
    prompt, prompt_ids = a_pass(7)
    steps = [a_pass(3, seed) for seed in range(2 * PENDING + 5)]
    shared = [rows_of([(prompt, slice(None), 7)])]
    for slot in range(3):
        found = rows_of(
            [(prompt, slice(None), 7), *((step, slice(slot, slot + 1), 1) for step, _ in steps)]
        )
        expected = np.concatenate([prompt_ids, *(ids[slot : slot + 1] for _, ids in steps)])
        assert not found[:, [0, 2]].any()
        np.testing.assert_array_equal(found[:, list(LAYERS)], expected)
        shared.append(found[:7])
    for one in shared:
        np.testing.assert_array_equal(one, shared[0])


@pytest.mark.parametrize("wrong", [-1, 8, 256])
def test_an_id_out_of_range_is_no_record(wrong: int) -> None:
    """Above all not 256, which a byte would make expert 0."""
    good, _ = a_pass(2)
    bad = Captured(LAYERS, 8)
    for layer in LAYERS:
        bad.add(layer, torch.tensor([[0, wrong]]))
    with pytest.raises(EngineError, match=r"must be in \[0, 8\), the model used "):
        convert([good, bad])


def test_a_layer_that_ran_twice_or_not_at_all_is_named() -> None:
    captured = Captured(LAYERS, 8)
    captured.add(1, torch.tensor([[0, 1]]))
    with pytest.raises(EngineError, match="layer 1 called its experts twice"):
        captured.add(1, torch.tensor([[0, 1]]))
    with pytest.raises(EngineError, match=r"layers \[3\] did not call their experts"):
        captured.ids()
