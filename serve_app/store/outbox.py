"""Arrays that wait in the producer's process until a shard pulls them.

The shard calls the producer's actor and keeps the reference that the call returns: the bytes go
to the object store once, the shard owns them, and the producer's event loop copies nothing.
"""

import itertools
import secrets
from typing import Any

import numpy.typing as npt

Batch = list[npt.NDArray[Any]]

_waiting: dict[int, list[Batch]] = {}
# Ray may repeat a shard's call in a restarted process: it must find no other batch there.
_numbers = itertools.count(secrets.randbits(48))


def leave(batches: list[Batch]) -> int:
    """Put arrays out to be pulled together, each batch as an object; return their number."""
    number = next(_numbers)
    _waiting[number] = batches
    return number


def withdraw(number: int) -> None:
    """Forget batches that nobody will pull any more."""
    _waiting.pop(number, None)


def give(_actor: object, number: int) -> tuple[Batch | None, ...]:
    """Hand batches over; runs in the producer's process, called by the shard.

    The last value comes by value: waiting for it tells that the call succeeded, without bringing
    the others, big ones over.
    """
    return *_waiting.pop(number), None
