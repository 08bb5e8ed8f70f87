"""The shard on this process's node: opened when it is first needed, and again after a failure."""

import asyncio
from collections.abc import Callable
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

    Raises the shard's own error, or `StoreUnavailable` where it did not answer.
    """

    def __init__(self, app: str, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._known: tuple[Actor, str | None] | None = None
        self._door: Door | None = None
        self._shut: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the shard has been found and has not failed since."""
        return self._known is not None

    def ask(self, call: Call, timeout_s: float) -> Any:
        """Call the actor and wait for its answer."""
        actor, _ = self._opened()
        try:
            return ray.get(call(actor), timeout=timeout_s)
        except RayError as error:
            raise self._failed(error) from None

    async def ask_async(self, call: Call, timeout_s: float) -> Any:
        """Do as `ask`, without blocking the running event loop."""
        actor, _ = await self._opened_async()
        try:
            return await asyncio.wait_for(call(actor), timeout_s)
        except TimeoutError:
            raise self._late(timeout_s) from None
        except RayError as error:
            raise self._failed(error) from None

    async def tell(self, method: str, argument: Any, timeout_s: float) -> Any:
        """Call a method through the shard's door, through Ray where it has none or it is shut.

        A door found shut is not tried again: a shard that began anew has another one.
        """
        _, address = await self._opened_async()
        if address is not None and address != self._shut:
            try:
                return await asyncio.wait_for(self._at(address).call(method, argument), timeout_s)
            except DoorShut:
                self._known, self._shut = None, address
            except TimeoutError:
                raise self._late(timeout_s) from None
        return await self.ask_async(
            lambda actor: getattr(actor, method).remote(argument), timeout_s
        )

    def _at(self, address: str) -> Door:
        """Return the door at an address."""
        if self._door is None or self._door.address != address:
            if self._door is not None:
                self._door.close()
            self._door = Door(address)
        return self._door

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

    def _late(self, timeout_s: float) -> StoreUnavailable:
        return StoreUnavailable(f"shard {this_node()} did not answer in {timeout_s} s")
