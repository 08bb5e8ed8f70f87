"""An engine's end: everything is answered, and no task or thread outlives it."""

import asyncio
import threading

import pytest

from serve_app.errors import EngineUnavailable
from tests.engine_contract.maker import MakeEngine
from tests.engine_contract.records import check_rows
from tests.engine_contract.requests import LONG, PROMPT, request
from tests.engine_contract.rollouts import Started, sample, submitted


class Stop:
    async def test_stop_ends_everything_and_leaves_nothing(self, make_engine: MakeEngine) -> None:
        tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
        engine = make_engine(max_batch_size=1)
        engine.check_health()
        run = await Started(engine, request(max_new_tokens=LONG)).first()
        waiting = await submitted(engine, request())
        await engine.stop()
        done = await run.rest()
        assert done.reason == "abort"
        check_rows(done.record, PROMPT, done.ids, engine)
        assert (await waiting).reason == "abort"
        await engine.stop()
        with pytest.raises(EngineUnavailable, match="stopped"):
            engine.check_health()
        with pytest.raises(EngineUnavailable, match="stopped"):
            await sample(engine, request())
        assert await engine.abort() == 0
        assert asyncio.all_tasks() == tasks
        assert set(threading.enumerate()) <= threads
