"""Rows that no record covers: which ids they have is a policy, and all of them are invalid.

``spread`` and ``random`` deal experts out like cards. A layer has its own order of all experts, and
row n takes the ``top_k`` of them from ``n * top_k`` on, round and round: no row repeats one.
The orders make every stretch even: of any 8 (2, 4, 16, …) experts that follow one another each is
in another eighth of them all, so that every expert-parallel rank gets its part of whatever comes.
What n is says `serve_app.assemble.ranks`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.types import BatchSpec

Array = npt.NDArray[Any]
Valid = npt.NDArray[np.bool_]
_AT_ONCE = 1 << 16
"""Ids of padding that are computed at once: they take 8 bytes each meanwhile."""


class Padding:
    """Fills rows that no record covers with the ids that a batch's pad policy asks for.

    They depend on the row's number, the layer and the seed alone, so the ranks' parts together
    are the whole, padding included.
    """

    def __init__(self, spec: BatchSpec, num_experts: int, columns: Sequence[int] = ()) -> None:
        self._policy = spec.pad
        self._experts = num_experts
        self._seed = spec.pad_seed
        self._columns = tuple(columns)

    def fill(self, ids: Array, valid: Valid, at: int = 0) -> None:
        """Fill ``ids`` ``[rows, layers, top_k]`` of the rows numbered from ``at`` on.

        All of them are invalid, whatever the ids.
        """
        valid[:] = False
        if self._policy == "mask" or not ids.size:
            ids[:] = 0
        elif self._policy == "spread":
            self._deal(ids, at + self._seed, _orders(self._experts, self._columns))
        elif self._policy == "random":
            self._deal(ids, at, _orders(self._experts, self._columns, self._seed % 2**64))
        else:
            self._draw(ids, at)

    def _deal(self, ids: Array, at: int, orders: Array) -> None:
        rows, layers, top_k = ids.shape
        period = self._experts // math.gcd(self._experts, top_k)
        done = min(rows, period)
        step = max(1, _AT_ONCE // (layers * top_k))
        for first in range(0, done, step):
            some = ids[first : min(first + step, done)]
            place = np.arange(len(some) * top_k) + (at + first) % period * top_k
            dealt = orders[place % self._experts].reshape(len(some), top_k, layers)
            some[:] = dealt.transpose(0, 2, 1)
        while done < rows:
            more = min(done, rows - done)
            ids[done : done + more] = ids[:more]
            done += more

    def _draw(self, ids: Array, at: int) -> None:
        rows, layers, top_k = ids.shape
        columns = np.array(self._columns, np.uint64)
        slot = columns[:, None] << np.uint64(32) | np.arange(top_k, dtype=np.uint64)
        seed = _scrambled(np.array([self._seed % 2**64], np.uint64))
        step = max(1, _AT_ONCE // (layers * top_k))
        for first in range(0, rows, step):
            some = ids[first : first + step]
            row = np.arange(at + first, at + first + len(some)).astype(np.uint64)
            key = _scrambled(seed + row)
            some[:] = _scrambled(key[:, None, None] + slot) % np.uint64(self._experts)


@lru_cache(maxsize=16)
def _orders(experts: int, columns: tuple[int, ...], seed: int = 0) -> Array:
    """Return an order of all experts for each layer, ``[experts, columns]``.

    A van der Corput sequence, scrambled as Owen does: the place's lowest digit, in the smallest
    prime factor of ``experts`` as base, says in which half of the experts (or third, …), the next
    in which part of that half, and so on; which is which is drawn anew for every half of a half.
    """
    column = np.array(columns, np.uint64) + np.uint64(1) << np.uint64(40)
    layer = _scrambled(_scrambled(np.array([seed], np.uint64)) + column)
    order = np.zeros((1, len(columns)), np.int64)
    for depth, base in enumerate(_factors(experts)):
        part = (np.uint64(depth) << np.uint64(34)) + (order.astype(np.uint64) << np.uint64(17))
        digits = np.arange(base, dtype=np.uint64)[:, None, None]
        digit = np.argsort(_scrambled(_scrambled(layer + part) + digits), axis=0)
        order = (order * base + digit).reshape(-1, len(columns))
    order = order.astype(np.min_scalar_type(experts - 1))
    order.flags.writeable = False
    return order


def _factors(number: int) -> list[int]:
    """Return the prime factors, the smallest first."""
    factors: list[int] = []
    base = 2
    while number > 1:
        if base * base > number:
            base = number
        while number % base == 0:
            factors.append(base)
            number //= base
        base += 1
    return factors


def _scrambled(numbers: Array) -> Array:
    """Splitmix64: another number for each, all bits mixed; arithmetic is modulo 2**64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
