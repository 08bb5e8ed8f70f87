"""A whole answer where its routes were expected: the error says where they are."""

import json
import re
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve_app.errors import RecordError
from serve_app.wire.registry import FORMATS, decode
from tests.unit.wire.samples import FULL, IDS, npy

ROUTES: Any = IDS.tolist()
GENERATE = {
    "text": 'a "quote" \\',
    "output_ids": [1, 2],
    "meta_info": {"output_token_logprobs": [[-0.5, 1], [-0.1, 2]], "routed_experts": ROUTES},
}
CHOICE = {"index": 0, "message": {"content": "{"}, "routed_experts": npy(IDS)}
ANSWERS: list[tuple[Any, str]] = [
    (GENERATE, "answer['meta_info']['routed_experts']"),
    ([GENERATE, GENERATE], "answer[0]['meta_info']['routed_experts']"),
    ({"meta_info": {"routed_experts": None}}, "there are none in it"),
    ({"choices": [CHOICE]}, "answer['choices'][0]['routed_experts']"),
    (
        {"id": 1, "choices": [{"routed_experts": None}, CHOICE]},
        "answer['choices'][1]['routed_experts']",
    ),
    (
        {"choices": [{"message": {"routed_experts": "nrlre1:"}}]},
        "answer['choices'][0]['message']['routed_experts']",
    ),
    (
        {"choices": [{"sgl_ext": {"routed_experts": "AAAA"}}]},
        "answer['choices'][0]['sgl_ext']['routed_experts']",
    ),
    ({"output_ids": [3], "routed_experts": "AAAA"}, "answer['routed_experts']"),
    ({"choices": []}, "there are none in it"),
]


@pytest.mark.parametrize(("answer", "place"), ANSWERS)
def test_an_answer_is_named_and_where_its_routes_are(answer: Any, place: str) -> None:
    for name in (None, *FORMATS):
        with pytest.raises(RecordError, match=f"got the whole answer.*{re.escape(place)}$"):
            decode(answer, FULL, format=name)


@pytest.mark.parametrize(("answer", "place"), ANSWERS)
def test_its_json_text_is_named_too(answer: Any, place: str) -> None:
    for indent in (None, 2):
        text = json.dumps(answer, indent=indent)
        for payload in (text, text.encode()):
            with pytest.raises(RecordError, match=f"JSON text of a whole.*{re.escape(place)}$"):
                decode(payload, FULL)


@pytest.mark.parametrize(
    "payload",
    [
        json.dumps(ROUTES),
        json.dumps({"data": "", "shape": [4, 3, 2], "dtype": "uint8"}),
        '{"text": "routed_experts", "a": "\\"choices\\""',
        "{" * 200,
        "[" * 200,
        "[]]]],:",
        '{"a": {"routed_experts": 1}}',
    ],
)
def test_other_json_text_is_to_be_parsed_first(payload: str) -> None:
    with pytest.raises(RecordError, match="expected routes, got JSON text: parse it first"):
        decode(payload, FULL)


def test_a_prompts_half_goes_with_the_other() -> None:
    answer = {"prompt_routed_experts": ROUTES, "choices": [CHOICE]}
    with pytest.raises(RecordError, match=r"answer\['prompt_routed_experts'\] and answer.*halves"):
        decode(answer, FULL)
    with pytest.raises(RecordError, match=r"answer\['prompt_routed_experts'\] and None to decode"):
        decode({**answer, "choices": [{"routed_experts": None}]}, FULL)
    with pytest.raises(RecordError, match=r"pass answer\['choices'\]\[0\]\['routed_experts'\]$"):
        decode({**answer, "prompt_routed_experts": None}, FULL)


def test_an_answer_that_is_an_object_is_named() -> None:
    with pytest.raises(RecordError, match=r"whole answer: pass answer\.routed_experts"):
        decode(SimpleNamespace(routed_experts="key"), FULL)


def test_meta_info_alone_is_a_payload() -> None:
    meta_info = {"id": "x", "prompt_tokens": 3, "routed_experts": "AQAAAAIAAAA="}
    with pytest.raises(RecordError, match="base64 of int32"):
        decode(meta_info, FULL)
    np.testing.assert_array_equal(decode(ROUTES, FULL).ids, IDS)


def test_json_text_is_not_parsed() -> None:
    text = "[" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="JSON text"):
            decode(text, FULL)
        assert tracemalloc.get_traced_memory()[1] < len(text)
    finally:
        tracemalloc.stop()


def test_answers_that_hold_themselves_end() -> None:
    answer: dict[str, Any] = {}
    answer["choices"] = answer["message"] = answer
    with pytest.raises(RecordError, match="there are none in it"):
        decode(answer, FULL)
