"""Actors of the tests, on the nodes that a test names."""

import asyncio
import os
from typing import Any

import ray

from serve_app.store.access.client import connect
from serve_app.store.owner.directory import find_shard, this_node
from tests.store_contract import LARGE, SMALL, record


@ray.remote(num_cpus=0)
class EngineLike:
    """Puts records from its event loop, as an engine replica does."""

    async def put(self, app: str, seeds: list[int]) -> list[str]:
        store = await asyncio.to_thread(connect, app, ray.get_runtime_context().current_actor)
        records = [record(LARGE, seed=seed) for seed in seeds]
        return list(await asyncio.gather(*(store.aput(put) for put in records)))

    async def put_in_turn(self, app: str, seeds: list[int]) -> list[str]:
        if not hasattr(self, "_store"):
            self._store = connect(app, ray.get_runtime_context().current_actor)
        return [await self._store.aput(record(LARGE, seed=seed)) for seed in seeds]

    async def hold_a_conversation(self, turns: int, app: str = "contract") -> list[str]:
        """Put small records, each one's child the next, as turns of a conversation do."""
        if not hasattr(self, "_store"):
            me = ray.get_runtime_context().current_actor
            self._store = await asyncio.to_thread(connect, app, me)
            self._keys: list[str] = []
        for turn in range(turns):
            parent = self._keys[-1] if turn else None
            chain = await self._store.adescribe(parent) if parent else []
            assert isinstance(chain, list)
            assert len(chain) == turn
            start = chain[-1].stop if chain else 0
            turned = record(SMALL, start=start, seed=turn)
            self._keys.append(await self._store.aput(turned, parent=parent))
        return self._keys[-turns:]

    def node(self) -> str:
        return this_node()

    def kill(self, app: str, name: str) -> None:
        actor = find_shard(app, name)
        assert actor is not None
        ray.kill(actor)


def start(actor: Any, node: str) -> Any:
    """Start an actor on the node that has a resource of this name."""
    return actor.options(resources={node: 1}).remote()


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))
