"""``/generate``, chat and completions: LMDeploy's and OpenAI's fields, in and out."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.graph.conftest import MODEL
from tests.http_server import LocalGraph, client_of

IDS = [5, 6, 7, 8]


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a stream's events; it must end as clients expect."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(http: httpx.Client, **body: Any) -> Any:
    return post(http, "/v1/chat/completions", **{"model": MODEL, "messages": [], **body})


def refusal(http: httpx.Client, path: str, body: dict[str, Any], status: int = 400) -> str:
    headers = {"content-type": "application/json"}
    answer = http.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert set(error) == {"message", "type", "code", "param", "object"}
    assert (error["code"], error["param"], error["object"]) == (status, None, "error")
    return str(error["message"])


def test_generate_answers_with_lmdeploys_fields(http: httpx.Client, graph: LocalGraph) -> None:
    body = {"input_ids": IDS, "max_tokens": 5, "ignore_eos": True, "seed": 1}
    answer = post(http, "/generate", **body, return_logprob=True, return_routed_experts=True)
    meta = answer["meta_info"]
    assert set(answer) == {"text", "output_ids", "meta_info"}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 5)
    assert meta["finish_reason"] == {"type": "length"}
    assert [token for _, token in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(logprob < 0 for logprob, _ in meta["output_token_logprobs"])
    assert graph.client.get(meta["routed_experts"]).ids.shape == (8, 4, 4)
    assert graph.client.release([meta["routed_experts"]]) == 1
    plain = post(http, "/generate", **body)
    assert plain["output_ids"] == answer["output_ids"]
    # xtuner needs the field to be there, whether or not it asked.
    assert plain["meta_info"]["routed_experts"] is None
    assert plain["meta_info"]["output_token_logprobs"] is None


def test_a_stream_of_generate_adds_up_to_the_whole(http: httpx.Client, graph: LocalGraph) -> None:
    body = {"input_ids": IDS, "max_tokens": 24, "ignore_eos": True, "seed": 2}
    body |= {"return_logprob": True, "return_routed_experts": True}
    whole = post(http, "/generate", **body)
    parts = events(http, "/generate", body)
    assert [token for part in parts for token in part["output_ids"]] == whole["output_ids"]
    assert "".join(part["text"] for part in parts) == whole["text"]
    pairs = [pair for part in parts for pair in part["meta_info"]["output_token_logprobs"] or []]
    assert pairs == whole["meta_info"]["output_token_logprobs"]
    *early, last = [part["meta_info"] for part in parts]
    assert {(meta["finish_reason"], meta["routed_experts"]) for meta in early} <= {(None, None)}
    assert last["finish_reason"] == {"type": "length"}
    assert last["completion_tokens"] == 24
    keys = [whole["meta_info"]["routed_experts"], last["routed_experts"]]
    assert graph.client.release(keys) == 2


def test_text_is_tokenized_with_the_models_own_tokenizer(
    http: httpx.Client, tiny_checkpoint: Path
) -> None:
    ids = AutoTokenizer.from_pretrained(tiny_checkpoint)("hello")["input_ids"]
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    from_text = post(http, "/generate", prompt="hello", **body)
    assert from_text["output_ids"] == post(http, "/generate", input_ids=ids, **body)["output_ids"]


def test_a_chat_goes_through_the_models_template(http: httpx.Client, tiny_checkpoint: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = tokenizer("<s>user\nhi</s><s>assistant\n", add_special_tokens=False)["input_ids"]
    options = {"temperature": 0, "max_tokens": 6, "return_token_ids": True, "ignore_eos": True}
    answer = chat(http, messages=messages, **options, return_logprob=True)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["total_tokens"] == len(ids) + 6
    assert choice["message"]["role"] == "assistant"
    assert [token for _, token in choice["output_token_logprobs"]] == choice["output_ids"]
    # xtuner's way: the same tokens, and no messages.
    again = chat(http, input_ids=ids, **options)["choices"][0]
    assert again["output_ids"] == choice["output_ids"]


def test_tools_and_template_options_reach_the_template(tmp_path: Path, graph: LocalGraph) -> None:
    from serve_app.ingress.edge.prompts import Prompts

    tokenizer = AutoTokenizer.from_pretrained(graph.edge().engine_args.model)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
        "{% if enable_thinking %}think{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    prompts = Prompts(tmp_path)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 42}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    ids = prompts._render(messages, tools, {"enable_thinking": True})
    assert prompts.detokenize(ids) == "[look_up]assistant42think"


def test_a_chat_streams_role_text_and_usage(http: httpx.Client, graph: LocalGraph) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "seed": 3,
        "n": 2,
        "return_token_ids": True,
        "return_routed_experts": True,
        "stream_options": {"include_usage": True},
    }
    *parts, usage = events(http, "/v1/chat/completions", body)
    whole = post(http, "/v1/chat/completions", **body)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"]["content"] for part in mine) == choice["message"]["content"]
        assert [token for part in mine for token in part["output_ids"]] == choice["output_ids"]
        assert "finish_reason" not in mine[0] or len(mine) == 1
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert graph.client.release([mine[-1]["routed_experts"], choice["routed_experts"]]) == 2


def test_completions_take_one_prompt_or_many(http: httpx.Client) -> None:
    body = {"model": MODEL, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    one = post(http, "/v1/completions", prompt="ab", **body)
    assert one["object"] == "text_completion"
    many = post(http, "/v1/completions", prompt=["ab", "ab"], n=2, **body)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in many["choices"]} == {one["choices"][0]["text"]}
    assert post(http, "/v1/completions", prompt=IDS, **body)["usage"]["prompt_tokens"] == 4
    parts = events(http, "/v1/completions", {"prompt": [IDS, IDS], **body})
    assert {part["choices"][0]["index"] for part in parts} == {0, 1}


def test_stop_strings_and_special_tokens(http: httpx.Client) -> None:
    body = {"input_ids": IDS, "max_tokens": 40, "seed": 5, "ignore_eos": True}
    text = post(http, "/generate", **body)["text"]
    stop = next(char for char in text[4:] if char.isalnum())
    cut = post(http, "/generate", **body, stop=stop)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop"}
    bias = {"1": 100}  # <s>, a special token
    options = {"model": MODEL, "max_tokens": 3, "logit_bias": bias, "temperature": 0}
    assert chat(http, input_ids=IDS, **options)["choices"][0]["message"]["content"] == ""
    shown = chat(http, input_ids=IDS, **options, skip_special_tokens=False)
    assert shown["choices"][0]["message"]["content"] == "<s><s><s>"
    parts = events(
        http,
        "/v1/chat/completions",
        {"messages": [], "input_ids": IDS, **options, "skip_special_tokens": False},
    )
    streamed = "".join(part["choices"][0]["delta"]["content"] for part in parts)
    assert streamed == "<s><s><s>"


def test_without_keys_routes_are_nested_lists(lists: LocalGraph) -> None:
    with client_of(lists.edge(model_name=MODEL, access_log=False)) as http:
        body = {"input_ids": IDS, "max_tokens": 90, "ignore_eos": True, "seed": 7}
        meta = post(http, "/generate", **body, return_routed_experts=True)["meta_info"]
        rows = meta["routed_experts"]
        assert (len(rows), len(rows[0]), len(rows[0][0])) == (93, 4, 4)
        streamed = events(http, "/generate", {**body, "return_routed_experts": True})
        assert streamed[-1]["meta_info"]["routed_experts"] == rows
        (choice,) = chat(http, **body, return_routed_experts=True)["choices"]
        assert choice["routed_experts"] == rows


def test_routes_that_nobody_records_are_refused_everywhere(tiny_checkpoint: Path) -> None:
    edge = LocalGraph(tiny_checkpoint).edge(model_name=MODEL, access_log=False)
    with client_of(edge) as http:
        asked = {"return_routed_experts": True, "model": MODEL}
        for path, body in (
            ("/generate", {"input_ids": IDS}),
            ("/v1/chat/completions", {"messages": [], "input_ids": IDS}),
            ("/v1/completions", {"prompt": IDS}),
        ):
            assert "enable_return_routed_experts is off" in refusal(http, path, {**body, **asked})


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/generate", {}, 400, "exactly one of prompt or input_ids"),
        ("/generate", {"input_ids": []}, 400, "must not be empty"),
        ("/generate", {"input_ids": ["x"]}, 400, "input_ids.0"),
        ("/generate", {"input_ids": [512]}, 400, r"\[0, 512\), got 512"),
        ("/generate", {"input_ids": [5] * 512}, 400, "at most 511 prompt tokens, got 512"),
        ("/generate", {"input_ids": IDS, "temperature": 3}, 400, "temperature"),
        ("/generate", {"input_ids": IDS, "max_tokens": 0}, 400, "positive"),
        ("/generate", {"input_ids": IDS, "top_logprobs_num": 2}, 400, "top_logprobs_num"),
        ("/generate", {"input_ids": IDS, "image_data": "x"}, 400, "image_data"),
        ("/generate", {"prompt": "\ud800"}, 400, "half a character"),
        ("/v1/completions", {"prompt": "a"}, 400, "model: Field required"),
        ("/v1/completions", {"model": "gpt", "prompt": "a"}, 404, "'gpt' does not exist"),
        ("/v1/completions", {"model": MODEL, "prompt": []}, 400, "must not be empty"),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "must not be empty"),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": 5}]},
            400,
            "messages.0.content",
        ),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"content": "x"}]},
            400,
            "messages.0.role",
        ),
        (
            "/v1/chat/completions",
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "x"}],
                "chat_template_kwargs": {"chat_template": "{{ 1 }}"},
            },
            400,
            "may not set",
        ),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [], "input_ids": IDS, "tool_choice": "required"},
            400,
            "no tool can be forced",
        ),
        ("/abort_request", {"session_id": 77}, 400, "Session 77 not found"),
        ("/v1/embeddings", {}, 404, "Not Found"),
    ],
)
def test_errors_have_lmdeploys_shape_and_statuses(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    said = refusal(http, path, body, status)
    assert re.search(message, said), said


def test_an_error_comes_before_a_stream_begins(http: httpx.Client) -> None:
    assert "512" in refusal(http, "/generate", {"input_ids": [512], "stream": True})


def test_unknown_fields_are_accepted(http: httpx.Client) -> None:
    post(http, "/generate", input_ids=IDS, max_tokens=1, no_stop_trim=True, sampling_seed=4)


def test_a_wrong_method_is_a_status_that_clients_know(http: httpx.Client) -> None:
    for answer in (http.get("/generate"), http.delete("/health"), http.options("/generate")):
        assert answer.status_code == 404
        assert "access-control-allow-origin" not in answer.headers


def test_a_session_is_aborted_by_its_id_and_has_one_request(http: httpx.Client) -> None:
    body = {"input_ids": IDS, "max_tokens": 480, "ignore_eos": True, "session_id": 7}
    with http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert "already in use" in refusal(http, "/generate", body)
        assert http.post("/abort_request", json={"session_id": 7}).status_code == 200
        last = [line for line in lines if line][-2]
    meta = json.loads(last.removeprefix("data: "))["meta_info"]
    assert meta["finish_reason"] == {"type": "abort"}
    assert post(http, "/generate", **{**body, "max_tokens": 1})["output_ids"]
