"""A shard's door: calls over a local socket, without Ray."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from serve_app.errors import StoreFull
from serve_app.store.door import Door, DoorShut, OpenDoor


class Echo:
    """Answers, refuses or waits."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.waiting = asyncio.Event()
        self.calls = 0
        self.served: OpenDoor

    async def echo(self, value: object) -> object:
        self.calls += 1
        return value

    async def refuse(self, value: object) -> object:
        raise StoreFull(f"no room for {value}")

    async def break_down(self, value: object) -> object:
        raise LookupError(value)

    async def wait(self, value: object) -> object:
        self.waiting.set()
        await self.let_go.wait()
        return value


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Door, Echo]]:
    echo = Echo()
    methods = {name: getattr(echo, name) for name in ("echo", "refuse", "break_down", "wait")}
    served = OpenDoor(methods)
    address = await served.open()
    assert address is not None
    door = Door(address)
    echo.served = served
    yield door, echo
    door.close()
    served.close()


def connections() -> int:
    """Count this process's sockets."""
    gc.collect()
    names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(name) and os.readlink(name).startswith("socket") for name in names)


async def test_results_and_refusals_come_back() -> None:
    async with opened() as (door, _):
        assert await door.call("echo", [b"\0" * 3_000_000, {"a": 1}]) == [
            b"\0" * 3_000_000,
            {"a": 1},
        ]
        with pytest.raises(StoreFull, match="no room for 5"):
            await door.call("refuse", 5)
        assert await door.call("echo", None) is None


async def test_a_call_that_waits_holds_up_no_other() -> None:
    async with opened() as (door, echo):
        waits = asyncio.create_task(door.call("wait", "long"))
        await echo.waiting.wait()
        assert await door.call("echo", "short") == "short"
        echo.let_go.set()
        assert await waits == "long"


async def test_calls_in_turn_share_a_connection() -> None:
    async with opened() as (door, _):
        await door.call("echo", 0)
        before = connections()
        for number in range(20):
            assert await door.call("echo", number) == number
        assert connections() == before


async def test_an_answer_reaches_only_the_call_it_belongs_to() -> None:
    async with opened() as (door, echo):
        late = asyncio.create_task(door.call("wait", "late"))
        await echo.waiting.wait()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        echo.let_go.set()
        answers = await asyncio.gather(*(door.call("echo", number) for number in range(10)))
        assert answers == list(range(10))


async def test_a_method_that_breaks_down_shuts_its_connection_only() -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: failures.append(what))
    async with opened() as (door, _):
        with pytest.raises(DoorShut):
            await door.call("break_down", 1)
        assert await door.call("echo", 2) == 2
    assert len(failures) == 1


async def test_a_door_that_was_closed_answers_nobody() -> None:
    async with opened() as (door, echo):
        assert await door.call("echo", 1) == 1
        waits = asyncio.create_task(door.call("wait", 2))
        await echo.waiting.wait()
        echo.served.close()
        for call in (waits, door.call("echo", 3), door.call("echo", 4)):
            with pytest.raises(DoorShut):
                await call
        assert echo.calls == 1


async def test_nobody_behind_the_door() -> None:
    with pytest.raises(DoorShut):
        await Door("\0r3serve-nobody").call("echo", 1)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_it_works_on_either_event_loop(run: Callable[[Awaitable[None]], None]) -> None:
    async def talk() -> None:
        async with opened() as (door, echo):
            before = connections()
            answers = await asyncio.gather(*(door.call("echo", number) for number in range(600)))
            assert answers == list(range(600))
            assert echo.calls == 600
            assert connections() <= before + 2 * 8  # both ends are in this process

    run(talk())
