"""The shard on this process's node: opened when it is first needed, and again after a failure."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from serve_app.errors import StoreUnavailable
from serve_app.store.calls import Actor, translate
from serve_app.store.directory import Settings, open_shard, this_node
from serve_app.store.door import Door, DoorShut

Call = Callable[[Actor], "ray.ObjectRef[Any]"]


class OwnShard:
    """Asks this node's shard; every call ends within the timeout that it is given, in seconds.

    (`ask` may take the store's call timeout longer, where it has to open the shard.) Raises the
    shard's own error, or `StoreUnavailable` where it did not answer.
    """

    def __init__(self, app: str, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._known: tuple[Actor, str | None] | None = None
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
            sent = call(actor)
            await asyncio.sleep(0)  # to send and to wait each take Ray a while: not in one turn
            return await sent

    async def tell(self, method: str, argument: Any, timeout_s: float) -> Any:
        """Call a method through the shard's door, through Ray where it has none or it is shut.

        A door found shut is not tried again: a shard that began anew has another one.
        """
        async with self._within(timeout_s):
            _, address = await self._opened_async()
            if address is not None and address != self._shut:
                with suppress(DoorShut):
                    return await self._through(address, method, argument)
            actor, _ = await self._opened_async()
            return await getattr(actor, method).remote(argument)

    async def tell_if_open(self, method: str, argument: Any, timeout_s: float) -> Any:
        """Do as `tell`, but make no shard where none is known: that is `StoreUnavailable`."""
        if self._known is None:
            raise StoreUnavailable(f"no shard of {self._app!r} is known on this node")
        actor, address = self._known
        async with self._within(timeout_s):
            if address is None or address == self._shut:
                return await getattr(actor, method).remote(argument)
            try:
                return await self._through(address, method, argument)
            except DoorShut as why:
                raise StoreUnavailable(f"shard {this_node()} does not answer: {why}") from None

    @asynccontextmanager
    async def _within(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise StoreUnavailable(f"shard {this_node()} did not answer in {timeout_s} s") from None
        except RayError as error:
            raise self._failed(error) from None

    async def _through(self, address: str, method: str, argument: Any) -> Any:
        if self._door is None or self._door.address != address:
            self._door = Door(address)
        try:
            return await self._door.call(method, argument)
        except DoorShut:
            self._shut = address
            if self._known is not None and self._known[1] == address:
                self._known = None
            raise

    def _opened(self) -> tuple[Actor, str | None]:
        # Another thread may forget the shard at any moment.
        if (known := self._known) is not None:
            return known
        self._known = found = open_shard(self._app, self._settings)
        return found

    async def _opened_async(self) -> tuple[Actor, str | None]:
        if (known := self._known) is not None:
            return known
        return await asyncio.to_thread(self._opened)

    def _failed(self, error: RayError) -> Exception:
        if not isinstance(error, RayTaskError):
            self._known = None
        return translate(error, this_node())
