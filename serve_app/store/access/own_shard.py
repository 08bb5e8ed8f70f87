"""The shard on this process's node: opened when it is first needed, and again after a failure."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from serve_app.errors import StoreUnavailable
from serve_app.store.access.calls import Actor, translate
from serve_app.store.door import Door, DoorShut
from serve_app.store.owner.directory import Settings, open_shard, this_node

Call = Callable[[Actor], "ray.ObjectRef[Any]"]
Known = tuple[Actor, str | None]
"""A shard and the address of its door."""


class OwnShard:
    """Asks this node's shard; every call ends within the timeout that it is given, in seconds.

    (`ask` may take the store's call timeout longer, where it has to open the shard.) Raises the
    shard's own error, or `StoreUnavailable` where it did not answer.
    """

    def __init__(self, app: str, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._known: Known | None = None
        self._door: Door | None = None
        self._shut: str | None = None

    def ask(self, call: Call, timeout_s: float) -> Any:
        """Call the actor and wait for its answer."""
        actor, _ = self._opened()
        try:
            return ray.get(call(actor), timeout=timeout_s)
        except RayError as error:
            raise self._failed(error) from None

    async def ask_async(self, call: Call, timeout_s: float) -> Any:
        """Do as `ask`, without blocking the running event loop."""
        async with self._within(timeout_s):
            actor, _ = await self._opened_async()
            return await _answer(call(actor))

    async def tell(self, method: str, argument: Any, timeout_s: float) -> Any:
        """Call a method through the shard's door, through Ray where it has none or it is shut."""
        async with self._within(timeout_s):
            with suppress(DoorShut):
                return await self._tell(await self._opened_async(), method, argument)
            return await self._tell(await self._opened_async(), method, argument)

    async def tell_if_open(self, method: str, argument: Any, timeout_s: float) -> Any:
        """Do as `tell`, but make no shard where none is known: that is `StoreUnavailable`."""
        if (known := self._known) is None:
            raise StoreUnavailable(f"no shard of {self._app!r} is known on this node")
        async with self._within(timeout_s):
            return await self._tell(known, method, argument)

    async def _tell(self, shard: Known, method: str, argument: Any) -> Any:
        """Raise `DoorShut` the first time only: a shard that began anew has another door."""
        actor, address = shard
        if address is None or address == self._shut:
            return await _answer(getattr(actor, method).remote(argument))
        if self._door is None or self._door.address != address:
            self._door = Door(address)
        try:
            return await self._door.call(method, argument)
        except DoorShut:
            self._shut = address
            if self._known is shard:
                self._known = None
            raise

    @asynccontextmanager
    async def _within(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise StoreUnavailable(f"shard {this_node()} did not answer in {timeout_s} s") from None
        except DoorShut as why:
            raise StoreUnavailable(f"shard {this_node()} does not answer: {why}") from None
        except RayError as error:
            raise self._failed(error) from None

    def _opened(self) -> Known:
        # Another thread may forget the shard at any moment.
        if (known := self._known) is not None:
            return known
        self._known = found = open_shard(self._app, self._settings)
        return found

    async def _opened_async(self) -> Known:
        if (known := self._known) is not None:
            return known
        return await asyncio.to_thread(self._opened)

    def _failed(self, error: RayError) -> Exception:
        if not isinstance(error, RayTaskError):
            self._known = None
        return translate(error, this_node())


async def _answer(sent: "ray.ObjectRef[Any]") -> Any:
    """Wait for a call just sent; either takes Ray a while, so not both in one turn of the loop."""
    await asyncio.sleep(0)
    return await sent
