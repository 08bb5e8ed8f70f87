"""Reading keys: where to assemble, and how often to try."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.joining import joined
from serve_app.assemble.shares import Nodes
from serve_app.client.remote import Decoders
from serve_app.client.served import ServedGraph
from serve_app.materialize import materialize
from serve_app.records import Record
from serve_app.store.access.client import ShardStore
from serve_app.store.keys import parse, shorten
from serve_app.store.owner.directory import this_node
from serve_app.types import (
    BatchSpec,
    ExpertBatch,
    PackedExperts,
    RoutedSequence,
    Where,
)
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.keyed import is_key
from serve_app.wire.registry import Payload, decode

if TYPE_CHECKING:
    import torch


class Reader:
    """Reads one application's keys. Reading destroys nothing, so trying again is safe."""

    def __init__(self, graph: ServedGraph) -> None:
        self._graph = graph
        self._decoders = Decoders(graph)

    def get(self, key: str) -> Record:
        """Return a key's whole sequence as one record."""
        (found,) = self._graph.store.fetch([key])
        if not isinstance(found, list):
            raise type(found)(f"key {shorten(key)}: {found}")
        return found[0] if len(found) == 1 else joined(found)

    def decode(self, payload: Payload, expected: Expected, allow_pickle: bool) -> Record:
        """See `serve_app.client.RoutedExpertsClient.decode`."""
        if not isinstance(payload, str) or not is_key(payload):
            return decode(payload, expected, allow_pickle=allow_pickle)
        record = self.get(payload)
        if record.meta.raw:
            return expected.to_record(record.ids)
        return expected.check(record)

    def assemble(
        self,
        sequences: Sequence[RoutedSequence],
        spec: BatchSpec,
        where: Where,
        out: "torch.Tensor | None" = None,
        pin: bool = False,
    ) -> ExpertBatch:
        """See `serve_app.client.RoutedExpertsClient.materialize`."""
        if where not in ("auto", "local", "decoder"):
            raise ValueError(f"where must be 'auto', 'local' or 'decoder', got {where!r}")
        target = None if out is None else out.numpy()
        allocate = _pinned if pin else None
        if (nodes := self._elsewhere(sequences, where)) is None:
            packed = materialize(self._graph.store, sequences, spec, target, allocate or np.empty)
        else:
            packed = self._decoders.gather(sequences, nodes, spec, target, allocate)
        return _as_tensors(packed, out)

    def _elsewhere(self, sequences: Sequence[RoutedSequence], where: Where) -> Nodes | None:
        """Return the nodes to read at, None to read here."""
        store = self._graph.store
        if where == "local" or (where == "auto" and not isinstance(store, ShardStore)):
            return None
        if not isinstance(store, ShardStore):
            return {"": range(len(sequences))}
        nodes: dict[str, list[int]] = {}
        for number, sequence in enumerate(sequences):
            nodes.setdefault(parse(sequence.key, store.app).shard, []).append(number)
        return None if where == "auto" and set(nodes) <= {this_node()} else nodes


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    from serve_app.tensors import pinned

    return pinned(shape, dtype)


def _as_tensors(packed: PackedExperts, out: "torch.Tensor | None") -> ExpertBatch:
    from serve_app.tensors import tensor_over

    return ExpertBatch(
        ids=tensor_over(packed.ids) if out is None else out,
        valid=tensor_over(packed.valid),
        cu_seqlens=tensor_over(packed.cu_seqlens),
        layers=packed.layers,
        columns=packed.columns,
        num_experts=packed.num_experts,
        missing=packed.missing,
    )
