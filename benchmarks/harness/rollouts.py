"""Finished rollouts of one shape: put as an engine puts them, read as a trainer reads them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import ray

from benchmarks.harness.routes import random_routes
from serve_app.client import RoutedExpertsClient
from serve_app.records import Record, make_record
from serve_app.store.access.client import connect
from serve_app.types import ExpertBatch, RoutedSequence

_EMPTY_S, _POLL_S = 30.0, 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """``count`` rollouts of ``[rows, layers, top_k]``."""

    count: int
    rows: int
    layers: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``64x4096x48x8``."""
        count, rows, layers, top_k = (int(part) for part in text.split("x"))
        return cls(count, rows, layers, top_k)

    @property
    def each(self) -> tuple[int, int, int]:
        return self.rows, self.layers, self.top_k

    @property
    def packed(self) -> tuple[int, int, int]:
        return self.count * self.rows, self.layers, self.top_k

    def __str__(self) -> str:
        return f"{self.count}x{self.rows}x{self.layers}x{self.top_k}"


class RolloutEngine:
    """Stands in for an engine replica; runs as an actor. Its routes are random."""

    def __init__(self, shape: Shape, num_experts: int) -> None:
        self._records = [_record(shape, num_experts, seed) for seed in range(shape.count)]

    async def put(self, app: str) -> list[str]:
        """Put all rollouts at once; the shard pulls them out of this process."""
        me = ray.get_runtime_context().current_actor
        store = await asyncio.to_thread(connect, app, me)
        return await asyncio.gather(*(store.aput(record) for record in self._records))

    async def put_upstream(self, store: Any) -> list[str]:
        """Put all rollouts as LMDeploy does: uint16, by value, into one actor."""
        arrays = [record.ids.astype(np.uint16) for record in self._records]
        keys: list[str] = await asyncio.gather(*(store.put.remote(array) for array in arrays))
        return keys


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Rollouts of one shape in the store, and the client that reads them."""

    client: RoutedExpertsClient
    shape: Shape
    sequences: list[RoutedSequence]

    @classmethod
    def put(cls, app: str, shape: Shape, engine: Any) -> Self:
        """Let a `RolloutEngine` actor put its rollouts."""
        keys = ray.get(engine.put.remote(app))
        return cls(
            RoutedExpertsClient(app), shape, [RoutedSequence(key, shape.rows) for key in keys]
        )

    def read(self, **how: Any) -> Callable[[Any], ExpertBatch]:
        """Return what materializes them all in one call."""
        return lambda _: self.client.materialize(self.sequences, **how)

    def release(self) -> None:
        """Give their memory back; returns when the store, which had nothing else, is empty.

        It drops many records over some turns of its loop: what is measured next neither shares
        the machine with that nor counts these bytes.
        """
        self.client.release([str(sequence.key) for sequence in self.sequences])
        give_up = time.monotonic() + _EMPTY_S
        while left := self.client.stats().live_bytes:
            if time.monotonic() > give_up:
                raise TimeoutError(f"{left} bytes are still held {_EMPTY_S} s after their release")
            time.sleep(_POLL_S)


def _record(shape: Shape, num_experts: int, seed: int) -> Record:
    return make_record(random_routes(shape.each, num_experts, seed), num_experts=num_experts)
