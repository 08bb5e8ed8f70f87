"""Reading keys: where to assemble, and how often to try."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.destination import Allocate, Array
from serve_app.assemble.joining import joined
from serve_app.assemble.shares import Nodes
from serve_app.client.metrics import ReaderMetrics
from serve_app.client.remote import Decoders
from serve_app.client.served import ServedGraph, wait_answer
from serve_app.errors import EngineUnavailable, ModelUnknown
from serve_app.materialize import materialize
from serve_app.records import ALL_TRACKS, Record
from serve_app.store.access.client import ShardStore
from serve_app.store.keys import parse, shorten
from serve_app.store.owner.directory import this_node
from serve_app.types import (
    BatchSpec,
    ExpertBatch,
    ModelShape,
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
        self._metrics = ReaderMetrics(graph.app)

    def get(self, key: str) -> Record:
        """Return a key's whole sequence as one record, with all of its tracks."""
        (found,) = self._graph.store.fetch([key], tracks=ALL_TRACKS)
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
        return _as_tensors(self.pack(sequences, spec, where, target, _pinned if pin else None), out)

    def pack(
        self,
        sequences: Sequence[RoutedSequence],
        spec: BatchSpec,
        where: Where = "local",
        out: Array | None = None,
        allocate: Allocate | None = None,
    ) -> PackedExperts:
        """Assemble in numpy; the engine says what a batch without any routes looks like."""
        try:
            return self._packed(sequences, spec, where, out, allocate)
        except ModelUnknown:
            if spec.on_missing == "raise" or spec.model is not None:
                raise
        spec = replace(spec, model=self._served_model())
        return self._packed(sequences, spec, where, out, allocate)

    def _packed(
        self,
        sequences: Sequence[RoutedSequence],
        spec: BatchSpec,
        where: Where,
        out: Array | None,
        allocate: Allocate | None,
    ) -> PackedExperts:
        if (nodes := self._elsewhere(sequences, where)) is not None:
            return self._decoders.gather(sequences, nodes, spec, out, allocate)
        packed = materialize(self._graph.store, sequences, spec, out, allocate or np.empty)
        self._metrics.assembled(packed)
        return packed

    def _served_model(self) -> ModelShape:
        """Ask the graph's engine which model it has; `ModelUnknown` where there is none."""
        try:
            info = wait_answer(self._graph.engine.info.remote(), self._graph.timeout_s)
        except (EngineUnavailable, AttributeError):
            raise ModelUnknown(
                "none of the sequences has routes left, and no engine is served here that knows"
                " their shape: expected model=ModelShape(layers, top_k, num_experts, moe_layers)"
            ) from None
        return ModelShape(info.layers, info.top_k, info.num_experts, tuple(info.moe_layers))

    def _elsewhere(self, sequences: Sequence[RoutedSequence], where: Where) -> Nodes | None:
        """Return the nodes to read at, None to read here."""
        store = self._graph.store
        if where == "local" or (where == "auto" and not isinstance(store, ShardStore)):
            return None
        if not isinstance(store, ShardStore):
            return {"": range(len(sequences))}
        nodes: dict[str, list[int]] = {}
        keyless: list[int] = []
        for number, sequence in enumerate(sequences):
            if sequence.key is None:
                keyless.append(number)
            else:
                nodes.setdefault(parse(sequence.key, store.app).shard, []).append(number)
        if where == "auto" and set(nodes) <= {this_node()}:
            return None
        if keyless:  # nowhere: told of where the first of the others is
            nodes.setdefault(next(iter(nodes), ""), []).extend(keyless)
        return nodes


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
        tokens=None if packed.tokens is None else tensor_over(packed.tokens),
        versions=packed.versions,
        version_of=tensor_over(packed.version_of),
    )
