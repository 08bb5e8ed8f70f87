"""Batches whose bytes lie on other nodes: sliced there, put together here.

A decoder on each node cuts the rank's rows out of that node's records, so nothing else crosses
the wire, at the stored width. Widening is the last copy's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from serve_app.assemble.copying import Copies
from serve_app.assemble.destination import Allocate, Array, destination
from serve_app.assemble.ranks import rank_rows
from serve_app.assemble.sequence_table import SequenceTable
from serve_app.assemble.shares import Nodes, Share, join, share_out
from serve_app.client.served import ServedGraph, wait_answer
from serve_app.errors import DecoderUnavailable, EngineUnavailable, RoutesLost
from serve_app.types import BatchSpec, PackedExperts, RoutedSequence

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentResponse


class Decoders:
    """Asks an application's decoders. Reading destroys nothing, so a call is sent twice at most."""

    def __init__(self, graph: ServedGraph) -> None:
        self._graph = graph

    def gather(
        self,
        sequences: Sequence[RoutedSequence],
        nodes: Nodes,
        spec: BatchSpec,
        out: Array | None,
        allocate: Allocate | None,
    ) -> PackedExperts:
        """Do as `serve_app.materialize.materialize`, each node's share of it on that node.

        With neither ``out`` nor ``allocate`` the ids may lie in shared memory.
        """
        make = allocate or np.empty
        if len(nodes) > 1:
            rows = rank_rows([sequence.length for sequence in sequences], spec)
            shares = share_out(sequences, nodes, rows)
            try:
                return join(shares, self._answers(shares, spec), rows, spec, out, make)
            except RoutesLost:
                if spec.on_missing == "raise":
                    raise
                # A node that lost all of its keys cannot tell the shape of what it masks.
        whole = Share(next(iter(nodes), ""), range(len(sequences)), sequences, None, [])
        (packed,) = self._answers([whole], spec)
        same = spec.dtype is None or packed.ids.dtype == spec.dtype
        if same and out is None and allocate is None:
            return packed
        ids = destination(out, packed.ids.shape, packed.ids.dtype, spec.dtype, make)
        copies = Copies()
        copies.into(ids).add(0, packed.ids)
        copies.run()
        return replace(packed, ids=ids)

    def _answers(self, shares: Sequence[Share], spec: BatchSpec) -> list[PackedExperts]:
        """Call a decoder for each share, all at the same time."""
        narrow = replace(spec, dtype=None)
        responses = [self._send(share, narrow) for share in shares]
        answers: list[PackedExperts] = []
        try:
            for share, response in zip(shares, responses, strict=True):
                try:
                    answers.append(self._receive(response))
                except DecoderUnavailable:  # once more: the bytes were not that replica's own
                    answers.append(self._receive(self._send(share, narrow)))
        except BaseException:
            for response in responses[len(answers) :]:
                response.cancel()  # type: ignore[no-untyped-call]
            # Serve and Ray keep errors in cycles, and this frame with them: let it pin no bytes.
            answers.clear()
            raise
        return answers

    def _send(self, share: Share, spec: BatchSpec) -> "DeploymentResponse[Any]":
        response: DeploymentResponse[Any] = self._graph.decoder.materialize.remote(
            SequenceTable.of(share.sequences), spec, share.pieces, near=share.node
        )
        return response

    def _receive(self, response: "DeploymentResponse[Any]") -> PackedExperts:
        timeout_s = self._graph.timeout_s
        try:
            answer: Any = wait_answer(response, timeout_s)
            if isinstance(answer, list):
                answer = ray.get(answer[0], timeout=timeout_s)
        except EngineUnavailable as error:
            raise DecoderUnavailable(str(error).replace("engine", "decoder")) from None
        except (ObjectLostError, GetTimeoutError) as error:
            raise DecoderUnavailable(f"the decoder's answer was lost: {error}") from None
        return cast("PackedExperts", answer)
