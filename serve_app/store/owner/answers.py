"""What a shard answers to a read: headers and places of the bytes, each object once."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import KeyUnreadable
from serve_app.records import Ids, RecordMeta
from serve_app.store.owner.holdings import Payload

if TYPE_CHECKING:
    import ray

    from serve_app.store.outbox import Batch

Place = tuple[int, int]
"""The number of the ref and the index in its list; of a small record `SMALL` and an offset."""
SMALL = -1
_ALIGNED = 8
Found = list[tuple[RecordMeta, Place]]
"""A key's segments."""
Described = list[list[RecordMeta] | KeyUnreadable]
"""The headers that keys are made of, or why they have none."""


def pack_described(answers: Described) -> bytes:
    """Pickle headers here: Ray's pickler takes ten times as long over many of them."""
    return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)


def unpack_described(packed: bytes) -> Described:
    """Return what `pack_described` was given."""
    answers: Described = pickle.loads(packed)
    return answers


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """One answer for a whole batch of keys: what each is made of, and every object once.

    ``packed`` is pickled here, because Ray's pickler takes ten times as long over many headers,
    and as plain tuples, which take half as long as named ones. ``small`` has the bytes of all
    small records in one array, which many of them reach the reader in without being copied.
    """

    packed: bytes
    small: npt.NDArray[np.uint8]
    refs: "list[ray.ObjectRef[Batch]]"

    @property
    def found(self) -> list[Found | KeyUnreadable]:
        """What each key is made of, or why it has nothing."""
        chains: list[list[tuple[tuple[Any, ...], Place]] | KeyUnreadable] = pickle.loads(
            self.packed
        )
        return [
            [(RecordMeta(*header), place) for header, place in chain]
            if isinstance(chain, list)
            else chain
            for chain in chains
        ]


class Collected:
    """Puts an answer together: each chain's headers, and every object once."""

    def __init__(self) -> None:
        self._chains: list[list[tuple[tuple[Any, ...], Place]] | KeyUnreadable] = []
        self._small: list[bytes] = []
        self._small_bytes = 0
        self._refs: list[ray.ObjectRef[Batch]] = []
        self._numbers: dict[int, int] = {}

    def add(self, chain: Sequence[tuple[RecordMeta, Payload]]) -> None:
        """Add one key's segments."""
        self._chains.append([(tuple(meta), self._place(payload)) for meta, payload in chain])

    def miss(self, why: KeyUnreadable) -> None:
        """Add a key that cannot be read."""
        self._chains.append(why)

    def answer(self) -> ReadAnswer:
        """Return everything that was added."""
        packed = pickle.dumps(self._chains, pickle.HIGHEST_PROTOCOL)
        small = np.frombuffer(b"".join([*self._small, bytes(_ALIGNED)]), np.uint8)
        return ReadAnswer(packed, small, self._refs)

    def _place(self, payload: Payload) -> Place:
        if isinstance(payload, bytes):
            offset, padding = self._small_bytes, -len(payload) % _ALIGNED
            self._small += (payload, bytes(padding)) if padding else (payload,)
            self._small_bytes += len(payload) + padding
            return SMALL, offset
        blob = payload.blob
        if (number := self._numbers.setdefault(id(blob), len(self._refs))) == len(self._refs):
            self._refs.append(blob.ref)
        return number, payload.index


def ids_of(meta: RecordMeta, small: npt.NDArray[np.uint8], offset: int) -> Ids:
    """Return a small record's ids, a view that keeps all of its answer's ``small``."""
    shape = meta.rows, meta.layers, meta.top_k
    ids: Ids = np.ndarray(shape, meta.dtype, small.data, offset)
    return ids
