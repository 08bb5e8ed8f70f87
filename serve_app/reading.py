"""Reading keys: where to assemble, and how often to try."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from serve_app.assemble.joining import joined
from serve_app.errors import DecoderUnavailable, EngineUnavailable
from serve_app.materialize import materialize
from serve_app.records import Record
from serve_app.served import ServedGraph, wait_answer
from serve_app.store.client import ShardStore
from serve_app.store.keys import shorten
from serve_app.types import (
    BatchSpec,
    ExpertBatch,
    PackedExperts,
    RoutedSequence,
    Where,
)
from serve_app.wire.expected import Expected
from serve_app.wire.keyed import is_key
from serve_app.wire.registry import Payload, decode

if TYPE_CHECKING:
    import torch


class Reader:
    """Reads one application's keys. Reading destroys nothing, so trying again is safe."""

    def __init__(self, graph: ServedGraph) -> None:
        self._graph = graph

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

    def materialize(
        self,
        sequences: Sequence[RoutedSequence],
        spec: BatchSpec,
        where: Where,
        out: "torch.Tensor | None",
    ) -> ExpertBatch:
        """See `serve_app.client.RoutedExpertsClient.materialize`."""
        if where not in ("auto", "local", "decoder"):
            raise ValueError(f"where must be 'auto', 'local' or 'decoder', got {where!r}")
        target = None if out is None else out.numpy()
        if where == "decoder" or (where == "auto" and not self._all_local(sequences)):
            packed = self._ask_decoder(sequences, spec)
            if target is not None:
                packed = _copied(packed, target)
        else:
            packed = materialize(self._graph.store, sequences, spec, target)
        return _as_tensors(packed, out)

    def _all_local(self, sequences: Sequence[RoutedSequence]) -> bool:
        store = self._graph.store
        if not isinstance(store, ShardStore):
            return True
        return all(store.is_local(sequence.key) for sequence in sequences)

    def _ask_decoder(self, sequences: Sequence[RoutedSequence], spec: BatchSpec) -> PackedExperts:
        """Call a decoder replica; once more if it died, since the bytes are not its own."""
        try:
            return self._decode(sequences, spec)
        except DecoderUnavailable:
            return self._decode(sequences, spec)

    def _decode(self, sequences: Sequence[RoutedSequence], spec: BatchSpec) -> PackedExperts:
        timeout_s = self._graph.timeout_s
        response = self._graph.decoder.materialize.remote(list(sequences), spec)
        try:
            answer: Any = wait_answer(response, timeout_s)
            if isinstance(answer, list):
                answer = ray.get(answer[0], timeout=timeout_s)
        except EngineUnavailable as error:
            raise DecoderUnavailable(str(error).replace("engine", "decoder")) from None
        except (ObjectLostError, GetTimeoutError) as error:
            raise DecoderUnavailable(f"the decoder's answer was lost: {error}") from None
        return cast("PackedExperts", answer)


def _copied(packed: PackedExperts, target: npt.NDArray[Any]) -> PackedExperts:
    if target.shape != packed.ids.shape or target.dtype != packed.ids.dtype:
        raise ValueError(
            f"out must be {packed.ids.dtype}{list(packed.ids.shape)},"
            f" got {target.dtype}{list(target.shape)}"
        )
    np.copyto(target, packed.ids)
    return replace(packed, ids=target)


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
