"""Requests that no engine takes, and the length at which it ends the others."""

from typing import Any

import pytest

from serve_app.engines.base import Engine
from serve_app.errors import InvalidRequest
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import check_rows
from tests.engine_contract.requests import PROMPT, request
from tests.engine_contract.rollouts import sample


class Refusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"input_ids": [1, 100_000]}, r"input_ids in \[0, \d+\), got 100000"),
            ({"input_ids": [1, -1]}, r"input_ids in \[0, \d+\), got -1"),
            ({"input_ids": [5] * 2048}, "at most 2047 prompt tokens.* 2048, got 2048"),
            ({"logit_bias": {100_000: 1.0}}, r"logit_bias in \[0, \d+\), got 100000"),
            ({"stop_token_ids": (100_000,)}, r"stop_token_ids in \[0, \d+\), got 100000"),
            ({"stop": ("",)}, "stop strings that are not empty"),
            ({"seed": 2**64}, "seed in .*, got 18446744073709551616"),
        ],
    )
    async def test_a_bad_request_is_one_clear_error(
        self, engine: Engine, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=message):
            engine.check(request(**fields))
        with pytest.raises(InvalidRequest, match=message):
            await sample(engine, request(**fields))

    async def test_an_empty_prompt_is_refused(self, engine: Engine) -> None:
        empty = request().model_copy(update={"input_ids": []})
        with pytest.raises(InvalidRequest, match="at least one prompt token"):
            engine.check(empty)

    async def test_the_context_length_ends_a_generation(self, make_engine: MakeEngine) -> None:
        engine = make_engine(context_length=16)
        assert engine.info.context_length == 16
        done = await sample(engine, request(max_new_tokens=100))
        assert (done.reason, len(done.ids)) == ("length", 16 - len(PROMPT))
        check_rows(done.record, PROMPT, done.ids, engine)
        full = await sample(engine, request(input_ids=[5] * 15))
        assert (full.reason, len(full.ids)) == ("length", 1)
        with pytest.raises(InvalidRequest, match="at most 15 prompt tokens"):
            engine.check(request(input_ids=[5] * 16))
