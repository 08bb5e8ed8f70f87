"""What a shard answers to a read: headers and places of the bytes, each object once."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.errors import KeyUnreadable
from serve_app.records import RecordMeta
from serve_app.store.holdings import Payload

if TYPE_CHECKING:
    import ray

    from serve_app.store.outbox import Batch

Found = list[tuple[RecordMeta, bytes | tuple[int, int]]]
"""A key's segments: header and bytes, or header and (number of the ref, index in its list)."""


@dataclass(frozen=True, slots=True)
class ReadAnswer:
    """One answer for a whole batch of keys: what each is made of, and every object once.

    ``packed`` is pickled here, because Ray's pickler takes ten times as long over many headers.
    """

    packed: bytes
    refs: "list[ray.ObjectRef[Batch]]"

    @property
    def found(self) -> list[Found | KeyUnreadable]:
        """What each key is made of, or why it has nothing."""
        unpacked: list[Found | KeyUnreadable] = pickle.loads(self.packed)
        return unpacked


class Collected:
    """Puts an answer together: each chain's headers, and every object once."""

    def __init__(self) -> None:
        self.found: list[Found | KeyUnreadable] = []
        self._refs: list[ray.ObjectRef[Batch]] = []
        self._numbers: dict[int, int] = {}

    def add(self, chain: Sequence[tuple[RecordMeta, Payload]]) -> None:
        """Add one key's segments."""
        segments: Found = []
        for meta, payload in chain:
            if isinstance(payload, bytes):
                segments.append((meta, payload))
                continue
            blob = payload.blob
            if (number := self._numbers.setdefault(id(blob), len(self._refs))) == len(self._refs):
                self._refs.append(blob.ref)
            segments.append((meta, (number, payload.index)))
        self.found.append(segments)

    def answer(self) -> ReadAnswer:
        """Return everything that was added."""
        return ReadAnswer(pickle.dumps(self.found, pickle.HIGHEST_PROTOCOL), self._refs)
