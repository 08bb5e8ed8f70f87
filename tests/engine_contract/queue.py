"""An engine's queue: its order, its end, and the names in it."""

import asyncio

import pytest

from serve_app.engines.base import Engine
from serve_app.errors import EngineOverloaded, InvalidRequest
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.requests import LONG, request
from tests.engine_contract.rollouts import Started, begun, sample


class Queue:
    async def test_a_full_queue_refuses_and_serves_what_it_took_in_order(
        self, make_engine: MakeEngine
    ) -> None:
        engine = make_engine(max_batch_size=1, max_waiting=2)
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        order: list[int] = []

        async def numbered(number: int) -> None:
            await sample(engine, request(max_new_tokens=2))
            order.append(number)

        tasks = [await begun(engine, numbered(number)) for number in range(2)]
        with pytest.raises(EngineOverloaded, match="2 wait"):
            await sample(engine, request())
        await engine.abort("a")
        await asyncio.gather(*tasks)
        assert order == [0, 1]
        assert (await run.rest()).reason == "abort"
        assert (await sample(engine, request())).reason == "length"

    async def test_an_id_in_use_is_refused(self, engine: Engine) -> None:
        run = await Started(engine, request(request_id="a", max_new_tokens=LONG)).first()
        with pytest.raises(InvalidRequest, match="'a' is already in use"):
            await sample(engine, request(request_id="a"))
        assert await engine.abort("a") == 1
        assert (await run.rest()).reason == "abort"
        assert (await sample(engine, request(request_id="a"))).reason == "length"
