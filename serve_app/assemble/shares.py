"""A rank's batch in shares: what each node has of it, and the shares together again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from serve_app.assemble.beside import Beside
from serve_app.assemble.copying import Copies
from serve_app.assemble.destination import Allocate, Array, destination
from serve_app.assemble.padding import Padding
from serve_app.assemble.ranks import Piece, RankRows
from serve_app.errors import RecordError
from serve_app.types import BatchSpec, PackedExperts, RoutedSequence

Nodes = Mapping[str, Sequence[int]]
"""The numbers of the sequences whose bytes lie on each node."""


@dataclass(frozen=True, slots=True)
class Share:
    """One node's sequences, which of the batch's they are, and the rank's ``pieces`` of them.

    Pieces count the share's own sequences; ``targets`` are the rank's rows that they go to.
    ``pieces=None`` is all that the rank has, padding included.
    """

    node: str
    numbers: Sequence[int]
    sequences: Sequence[RoutedSequence]
    pieces: list[Piece] | None
    targets: list[slice]


def share_out(sequences: Sequence[RoutedSequence], nodes: Nodes, rows: RankRows) -> list[Share]:
    """Return each node's share; one without rows of this rank still has its sequences checked."""
    shares: list[Share] = []
    owners: dict[int, tuple[list[Piece], list[slice], int]] = {}
    for node, numbers in nodes.items():
        pieces, targets = list[Piece](), list[slice]()
        chosen = [sequences[number] for number in numbers]
        shares.append(Share(node, numbers, chosen, pieces, targets))
        owners.update({number: (pieces, targets, own) for own, number in enumerate(numbers)})
    for here, piece in rows.placed():
        if piece.sequence is not None:
            pieces, targets, own = owners[piece.sequence]
            pieces.append(piece._replace(sequence=own))
            targets.append(here)
    return shares


def join(
    shares: Sequence[Share],
    answers: Sequence[PackedExperts],
    rows: RankRows,
    spec: BatchSpec,
    out: Array | None,
    allocate: Allocate,
) -> PackedExperts:
    """Copy each share's rows to where they belong, widening them, and fill the padding between.

    Raises `RecordError` if the shares are not all of one model.
    """
    first = answers[0]
    for share, answer in zip(shares, answers, strict=True):
        if answer.model != first.model:
            raise RecordError(
                f"keys on node {share.node} have (layers, top_k, experts, MoE layers)"
                f" {answer.model}, those on node {shares[0].node} {first.model}"
            )
    each = first.ids.shape[-2:]
    ids = destination(out, (*rows.lead, *each), first.ids.dtype, spec.dtype, allocate)
    valid = np.empty(rows.lead, dtype=np.bool_)
    flat, flat_valid = ids.reshape(rows.rows, *each), valid.reshape(rows.rows)
    beside = Beside(
        rows.rows,
        (version for answer in answers for version in answer.versions),
        tokens="tokens" in spec.tracks,
    )
    copies = Copies()
    target = copies.into(flat)
    for share, answer in zip(shares, answers, strict=True):
        at = 0
        for here in share.targets:
            there = slice(at, at := at + here.stop - here.start)
            target.add(here.start, answer.ids[there])
            flat_valid[here] = answer.valid[there]
            beside.take(here, answer, there)
    padding = Padding(spec, first.num_experts, first.columns)
    for here, piece in rows.placed():
        if piece.sequence is None:
            padding.fill(flat[here], flat_valid[here], piece.at)
    copies.run()
    missing = [
        replace(gap, index=share.numbers[gap.index])
        for share, answer in zip(shares, answers, strict=True)
        for gap in answer.missing
    ]
    return replace(
        first,
        ids=ids,
        valid=valid,
        cu_seqlens=np.array(rows.boundaries, dtype=np.int32),
        missing=tuple(sorted(missing, key=lambda gap: (gap.index, gap.first))),
        versions=beside.versions,
        version_of=beside.version_of.reshape(rows.lead),
        tokens=None if beside.tokens is None else beside.tokens.reshape(rows.lead),
        unrouted=sum(answer.unrouted for answer in answers),
        not_valid=sum(answer.not_valid for answer in answers),
    )
