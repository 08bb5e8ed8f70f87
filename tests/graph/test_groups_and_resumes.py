"""Groups, continued rollouts and sleep through the whole graph, in Serve's local testing mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app import GenerateRequest, GenerateResult, RoutedExpertsClient, RoutedSequence
from serve_app.errors import (
    EngineAsleep,
    InvalidRequest,
    KeyReleased,
    PrefixMismatch,
    RecordError,
    UnknownKey,
)
from serve_app.store.owner.memory import shared
from tests.distinct_ids import distinct_ids
from tests.graph.test_rollout_graph import request, serve_locally

PROMPT = [5, 6, 7, 8]


def key_of(result: GenerateResult) -> str:
    assert result.routed_experts_error is None
    assert isinstance(result.routed_experts, str)
    return result.routed_experts


def continuing(result: GenerateResult, tokens: list[int], **fields: Any) -> GenerateRequest:
    return request(input_ids=tokens, continue_from=key_of(result), **fields)


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return dict(model.state_dict())


# Groups.


def test_a_groups_prompt_is_stored_once(client: RoutedExpertsClient) -> None:
    wanted = request(input_ids=list(range(3, 103)), max_new_tokens=6)
    group = client.generate_group(wanted, n=8)
    one_row = 4 * 4 + 4  # layers x top_k, a byte each, and the token
    assert client.stats().live_bytes == (100 + 8 * 5) * one_row
    assert client.stats().live_keys == 8
    assert [result.request_id for result in group] == [f"{wanted.request_id}-{i}" for i in range(8)]
    for index, result in enumerate(group):
        alone = client.generate(wanted.member(index))
        assert result.output_ids == alone.output_ids
        assert result.num_routed_tokens == alone.num_routed_tokens == 105
        mine, other = client.get(key_of(result)), client.get(key_of(alone))
        np.testing.assert_array_equal(mine.ids, other.ids)
        client.release([key_of(alone)])
    keys = [key_of(result) for result in group]
    batch = client.materialize([RoutedSequence(key, 106) for key in keys])
    assert batch.valid.sum() == 8 * 105
    client.release(keys[1:])
    assert client.stats().live_bytes == (100 + 5) * one_row
    assert client.get(keys[0]).ids.shape[0] == 105
    client.release(keys[:1])


@pytest.mark.parametrize("new", [1, 2])
def test_a_group_of_one_token_each(client: RoutedExpertsClient, new: int) -> None:
    group = client.generate_group(request(max_new_tokens=new, tag="g"), n=3)
    assert {result.num_routed_tokens for result in group} == {3 + new}
    for result in group:
        assert client.get(key_of(result)).ids.shape[0] == 3 + new
    assert client.release(tag="g") == 3


def test_a_member_that_keeps_no_token_has_its_own_rows(client: RoutedExpertsClient) -> None:
    """A stripped stop token as the only one: P-1 rows, one less than the others' prompt."""
    first = client.generate(request(max_new_tokens=1, tag="g")).output_ids[0]
    wanted = request(stop_token_ids=(first,), include_stop_token=False, tag="g")
    group = client.generate_group(wanted, n=4)
    assert group[0].output_ids == []
    for result in group:
        rows = 4 + len(result.output_ids) - 1
        assert result.num_routed_tokens == client.get(key_of(result)).ids.shape[0] == rows
    client.release(tag="g")


def test_groups_without_keys_answer_arrays(tiny_checkpoint: Path) -> None:
    arrays = serve_locally(tiny_checkpoint, enable_return_routed_experts=True)
    group = arrays.generate_group(request(), n=2)
    for result in group:
        assert isinstance(result.routed_experts, np.ndarray)
        assert result.routed_experts.shape == (9, 4, 4)
    with pytest.raises(InvalidRequest, match="enable_transfer_obj_ref is off"):
        arrays.generate(request(continue_from="key"))
    with pytest.raises(InvalidRequest, match=r"1 to .* rollouts, got 0"):
        arrays.generate_group(request(), n=0)


# Resuming.


def test_a_second_turn_stores_only_its_rows(client: RoutedExpertsClient) -> None:
    first = client.generate(request(tag="turn"))
    tokens = [*PROMPT, *first.output_ids, 11, 12, 13]
    second = client.generate(continuing(first, tokens, tag="turn"))
    rows = len(tokens) + 5
    assert second.num_routed_tokens == rows
    assert client.stats().live_bytes == rows * 20
    record = client.get(key_of(second))
    assert record.ids.shape[0] == rows
    whole = client.generate(request(input_ids=tokens, tag="turn"))
    assert whole.output_ids == second.output_ids
    np.testing.assert_array_equal(client.get(key_of(whole)).ids, record.ids)
    client.release([key_of(first)])
    assert client.materialize([RoutedSequence(key_of(second), rows)]).valid.all()
    third = client.generate(continuing(second, [*tokens, *second.output_ids, 14], tag="turn"))
    assert third.num_routed_tokens == rows + 2 + 5
    client.release(tag="turn")


def test_every_segment_keeps_its_version(
    client: RoutedExpertsClient, weights: dict[str, torch.Tensor]
) -> None:
    first = client.generate(request(tag="turn"))
    before = client.get(key_of(first)).ids
    client.update_weights({name: -value for name, value in weights.items()}, version=7)
    tokens = [*PROMPT, *first.output_ids]
    second = client.generate(continuing(first, tokens, tag="turn"))
    client.update_weights(weights, version=8)
    third = client.generate(continuing(second, [*tokens, *second.output_ids], tag="turn"))
    (chain,) = shared("local").describe([key_of(third)])
    assert isinstance(chain, list)
    versions = [(meta.start, meta.stop, meta.weight_version) for meta in chain]
    assert versions == [(0, 9, first.weight_version), (9, 15, 7), (15, 21, 8)]
    np.testing.assert_array_equal(client.get(key_of(third)).ids[:9], before)
    batch = client.materialize([RoutedSequence(key_of(third), 22)])
    own = [first.weight_version] * 9
    assert batch.weight_version.tolist() == [*own, *[7] * 6, *[8] * 6, -1]
    assert client.release(weight_version_below=8) == 2
    assert client.stats().live_keys == 1
    assert client.release(weight_version_below=9) == 1


def test_a_group_may_continue(client: RoutedExpertsClient) -> None:
    first = client.generate(request(tag="turn"))
    tokens = [*PROMPT, *first.output_ids, 11, 12, 13]
    group = client.generate_group(continuing(first, tokens, tag="turn"), n=4)
    assert client.stats().live_bytes == (len(tokens) + 4 * 5) * 20
    for index, result in enumerate(group):
        alone = client.generate(request(input_ids=tokens, tag="turn").member(index))
        assert alone.output_ids == result.output_ids
        np.testing.assert_array_equal(client.get(key_of(result)).ids, client.get(key_of(alone)).ids)
    client.release(tag="turn")


def test_nothing_new_to_store_still_makes_a_key(client: RoutedExpertsClient) -> None:
    """The sequence goes on where the record ends: its last row is kept twice."""
    first = client.generate(request(tag="turn"))
    tokens = [*PROMPT, *first.output_ids][:9]
    second = client.generate(continuing(first, tokens, max_new_tokens=1, tag="turn"))
    assert second.num_routed_tokens == 9
    np.testing.assert_array_equal(client.get(key_of(second)).ids, client.get(key_of(first)).ids)
    client.release(tag="turn")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [5, 6, 7, 8, 1, 2, 3, 4, 9, 9],
            r"they part at position 4: expected token \d+, on which it was captured, got 1",
        ),
        ([5, 6, 7, 8], "expected at least 9 tokens, got 4"),
    ],
)
def test_another_prefix_is_refused(
    client: RoutedExpertsClient, tokens: list[int], message: str
) -> None:
    first = client.generate(request(tag="turn"))
    with pytest.raises(PrefixMismatch, match=message):
        client.generate(continuing(first, tokens))
    client.release(tag="turn")
    with pytest.raises(KeyReleased):
        client.generate(continuing(first, [*PROMPT, *first.output_ids]))
    with pytest.raises(UnknownKey):
        client.generate(request(continue_from="made up"))


def test_routes_that_cannot_be_checked_are_refused(client: RoutedExpertsClient) -> None:
    ids = distinct_ids((4, 4, 4), 16)
    key = client.put(ids, num_experts=16, moe_layers=(0, 2, 3), tag="turn")
    with pytest.raises(PrefixMismatch, match="put without tokens"):
        client.generate(request(continue_from=key))
    other = client.put(ids, num_experts=32, moe_layers=(0, 2, 3), tokens=PROMPT, tag="turn")
    with pytest.raises(RecordError, match=r"expected \(layers, .* 16, .* got .* 32,"):
        client.generate(request(continue_from=other))
    client.release(tag="turn")


# Sleep.


def test_asleep_requests_are_answered_as_such(
    client: RoutedExpertsClient, weights: dict[str, torch.Tensor]
) -> None:
    before = client.generate(request(return_routed_experts=False))
    client.sleep()
    with pytest.raises(EngineAsleep, match="wake"):
        client.generate(request())
    client.wake()
    after = client.generate(request(return_routed_experts=False))
    assert (after.output_ids, after.weight_version) == (before.output_ids, before.weight_version)
    client.sleep(level=2)
    with pytest.raises(EngineAsleep, match="wake"):
        client.update_weights(weights, version=9)
    client.wake()
    client.update_weights(weights, version=9)
    after = client.generate(request(return_routed_experts=False))
    assert (after.output_ids, after.weight_version) == (before.output_ids, 9)
    with pytest.raises(ValueError, match="1 or 2, got 3"):
        client.sleep(3)  # type: ignore[arg-type]
