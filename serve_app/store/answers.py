"""What a shard answers to a read: headers and places of the bytes, each object once.

Time counts for each key, so a header travels as two tuples: what records of one model share,
written once an answer, and what is a record's own.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from serve_app.errors import KeyUnreadable
from serve_app.records import RecordMeta
from serve_app.store.holdings import Payload

if TYPE_CHECKING:
    import ray

    from serve_app.store.outbox import Batch

Place = bytes | tuple[int, int]
"""A record's bytes, or the number of the ref and the index in its list."""
Found = list[tuple[RecordMeta, Place]]
"""A key's segments."""
Described = list[list[RecordMeta] | KeyUnreadable]
"""The headers that keys are made of, or why they have none."""

_model_of = attrgetter("layers", "top_k", "num_experts", "moe_layers", "format_version", "raw")
_own_of = attrgetter("rows", "start", "weight_version", "checksum", "token_hash", "invalid")


def pack_described(answers: Described) -> bytes:
    """Pickle headers here: Ray's pickler takes ten times as long over many of them."""
    return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)


def unpack_described(packed: bytes) -> Described:
    """Return what `pack_described` was given."""
    answers: Described = pickle.loads(packed)
    return answers


def _header(own: tuple[Any, ...], model: tuple[Any, ...]) -> RecordMeta:
    rows, start, weight_version, checksum, token_hash, invalid = own
    layers, top_k, num_experts, moe_layers, format_version, raw = model
    return RecordMeta(
        rows,
        layers,
        top_k,
        num_experts,
        start,
        moe_layers,
        weight_version,
        checksum,
        token_hash,
        invalid,
        format_version,
        raw,
    )


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
        models, chains = pickle.loads(self.packed)
        return [
            [(_header(own, models[number]), place) for own, number, place in chain]
            if isinstance(chain, list)
            else chain
            for chain in chains
        ]


class Collected:
    """Puts an answer together: each chain's headers, and every object once."""

    def __init__(self) -> None:
        self._chains: list[list[tuple[Any, int, Place]] | KeyUnreadable] = []
        self._models: list[tuple[Any, ...]] = []
        self._refs: list[ray.ObjectRef[Batch]] = []
        self._numbers: dict[int, int] = {}

    def add(self, chain: Sequence[tuple[RecordMeta, Payload]]) -> None:
        """Add one key's segments."""
        self._chains.append(
            [(_own_of(meta), self._model(meta), self._place(payload)) for meta, payload in chain]
        )

    def miss(self, why: KeyUnreadable) -> None:
        """Add a key that cannot be read."""
        self._chains.append(why)

    def answer(self) -> ReadAnswer:
        """Return everything that was added."""
        packed = pickle.dumps((self._models, self._chains), pickle.HIGHEST_PROTOCOL)
        return ReadAnswer(packed, self._refs)

    def _model(self, meta: RecordMeta) -> int:
        model = _model_of(meta)
        if not self._models or model != self._models[-1]:
            self._models.append(model)
        return len(self._models) - 1

    def _place(self, payload: Payload) -> Place:
        if isinstance(payload, bytes):
            return payload
        blob = payload.blob
        if (number := self._numbers.setdefault(id(blob), len(self._refs))) == len(self._refs):
            self._refs.append(blob.ref)
        return number, payload.index
