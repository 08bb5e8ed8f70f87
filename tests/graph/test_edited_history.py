"""Rollouts that continue others whose tokens part from theirs, through the whole graph."""

from typing import Any

import numpy as np
import pytest

from serve_app import RoutedExpertsClient
from serve_app.errors import PrefixMismatch, RecordError
from tests.distinct_ids import distinct_ids
from tests.graph.test_groups_and_resumes import PROMPT, continuing, key_of
from tests.graph.test_rollout_graph import request


def test_an_agent_that_edits_its_history_loses_only_what_it_edited(
    client: RoutedExpertsClient,
) -> None:
    first = client.generate(request(tag="turn", max_new_tokens=8))
    tokens = [*PROMPT, *first.output_ids]
    edited = [*tokens[:7], 1, *tokens[9:], 11]
    with pytest.raises(PrefixMismatch, match=rf"position 7: expected token {tokens[7]},.* got 1"):
        client.generate(continuing(first, edited))
    before = client.get(key_of(first)).ids
    second = client.generate(continuing(first, edited, tag="turn", on_divergence="prefix"))
    assert (first.continued_rows, second.continued_rows) == (0, 7)
    whole = [*edited, *second.output_ids]
    assert second.num_routed_tokens == len(whole) - 1
    record = client.get(key_of(second))
    assert record.tokens is not None
    assert record.tokens.tolist() == whole[:-1]
    alone = client.generate(request(input_ids=edited, tag="turn"))
    assert alone.output_ids == second.output_ids
    np.testing.assert_array_equal(client.get(key_of(alone)).ids[7:], record.ids[7:])
    np.testing.assert_array_equal(record.ids[:7], before[:7])
    np.testing.assert_array_equal(client.get(key_of(first)).ids, before)
    client.release(tag="turn")


@pytest.mark.parametrize(
    ("tokens", "rows"), [([9, 6, 7, 8, 9], 0), (PROMPT, 4), (PROMPT[:2], 2), ([5, 6, 1], 2)]
)
def test_what_is_common_may_be_all_or_nothing(
    client: RoutedExpertsClient, tokens: list[int], rows: int
) -> None:
    first = client.generate(request(tag="turn"))
    second = client.generate(continuing(first, tokens, tag="turn", on_divergence="prefix"))
    assert second.continued_rows == rows
    record = client.get(key_of(second))
    assert record.tokens is not None
    assert record.tokens.tolist() == [*tokens, *second.output_ids][:-1]
    alone = client.generate(request(input_ids=tokens, tag="turn"))
    np.testing.assert_array_equal(client.get(key_of(alone)).ids, record.ids)
    client.release(tag="turn")


def test_a_groups_edited_history_is_shared(client: RoutedExpertsClient) -> None:
    first = client.generate(request(tag="turn"))
    tokens = [*PROMPT, first.output_ids[0], 1, 2, 3]
    edited = continuing(first, tokens, tag="turn", on_divergence="prefix")
    group = client.generate_group(edited, n=3)
    assert {result.continued_rows for result in group} == {5}
    assert client.stats().live_bytes == (9 + (len(tokens) - 5) + 3 * 5) * 20
    for index, result in enumerate(group):
        alone = client.generate(request(input_ids=tokens, tag="turn").member(index))
        np.testing.assert_array_equal(client.get(key_of(result)).ids, client.get(key_of(alone)).ids)
    client.release(tag="turn")


def test_a_chain_that_was_put_keeps_its_tokens(client: RoutedExpertsClient) -> None:
    ids = distinct_ids((6, 4, 4), 16)
    how: dict[str, Any] = {"num_experts": 16, "moe_layers": (0, 2, 3), "tag": "turn"}
    parent = client.put(ids[:4], tokens=PROMPT, **how)
    child = client.put(ids, tokens=[*PROMPT, 9, 10], parent=parent, **how)
    assert child.continued_rows == 4
    resumed = client.generate(
        request(input_ids=[*PROMPT, 9, 10, 11], continue_from=child, tag="turn")
    )
    assert resumed.continued_rows == 6
    with pytest.raises(PrefixMismatch, match=r"position 2: expected token 7, .* got 3"):
        client.put(ids, tokens=[5, 6, 3, 4, 5, 6], parent=parent, **how)
    branch = client.put(
        ids, tokens=[5, 6, 3, 4, 5, 6], parent=parent, on_divergence="prefix", **how
    )
    assert branch.continued_rows == 2
    with pytest.raises(RecordError, match="on_divergence='prefix' compares tokens"):
        client.put(ids, parent=parent, on_divergence="prefix", **how)
    client.release(tag="turn")
