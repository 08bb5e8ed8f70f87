"""Conversations over HTTP: a key goes on under the next one, and edited history is said."""

import httpx

from tests.graph.test_http_sampling import IDS, post, refusal
from tests.http_server import LocalGraph


def test_edited_history_is_refused_or_taken_over_in_part(
    http: httpx.Client, graph: LocalGraph
) -> None:
    body = {"max_tokens": 5, "ignore_eos": True, "seed": 1, "return_routed_experts": True}
    first = post(http, "/generate", input_ids=IDS, **body)
    assert "continued_rows" not in first["meta_info"]
    key = first["meta_info"]["routed_experts"]
    tokens = [*IDS, *first["output_ids"]]
    edited = [*tokens[:6], (tokens[6] + 1) % 200, 9, 9]
    asked = {"input_ids": edited, **body, "continue_from": key}
    said = refusal(http, "/generate", asked)
    assert f"they part at position 6: expected token {tokens[6]}" in said
    assert f"got {edited[6]}" in said
    second = post(http, "/generate", **asked, on_divergence="prefix")
    assert second["meta_info"]["continued_rows"] == 6
    found = graph.client.get(second["meta_info"]["routed_experts"])
    assert found.tokens is not None
    assert found.tokens.tolist() == [*edited, *second["output_ids"]][:-1]
    assert "on_divergence" in refusal(http, "/generate", {**asked, "on_divergence": "sometimes"})
    assert graph.client.release([key, second["meta_info"]["routed_experts"]]) == 2
