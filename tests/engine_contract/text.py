"""An engine's text: what is decoded, and what a stop string leaves of it."""

import asyncio

from serve_app.engines.base import Engine
from tests.engine_contract.records import check_rows
from tests.engine_contract.reference import Reference
from tests.engine_contract.requests import PROMPT, request, varied
from tests.engine_contract.rollouts import sample, visible_piece


class Text:
    async def test_stop_string_cuts_text_but_no_ids(
        self, engine: Engine, reference: Reference
    ) -> None:
        plain = await sample(engine, varied(max_new_tokens=24))
        stop = visible_piece(plain.text, len(plain.text) // 3)
        done = await sample(engine, varied(max_new_tokens=24, stop=(stop,)))
        assert done.reason == "stop"
        assert done.text == plain.text[: plain.text.index(stop)]
        assert done.ids == plain.ids[: len(done.ids)]
        assert stop in reference.decode(done.ids)
        assert stop not in reference.decode(done.ids[:-1])
        check_rows(done.record, PROMPT, done.ids, engine)

    async def test_streamed_text_equals_the_final_decode(
        self, engine: Engine, reference: Reference
    ) -> None:
        wanted = [
            request(max_new_tokens=24, temperature=1.5, seed=seed, stop=("never to be found",))
            for seed in range(4)
        ]
        for done in await asyncio.gather(*(sample(engine, one) for one in wanted)):
            assert done.text == reference.decode(done.ids)
