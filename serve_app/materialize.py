"""Keys to a packed tensor: fetch, stitch, lay out. The one path of the client and the decoder."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from serve_app.assemble.copying import Copies
from serve_app.assemble.destination import Allocate, Array, destination
from serve_app.assemble.layout import Filling, columns_of
from serve_app.assemble.padding import Padding
from serve_app.assemble.ranks import Piece, RankRows, rank_rows
from serve_app.assemble.stitch import Stitched, stitch
from serve_app.errors import KeyExpired, RecordError, RoutesGap, RoutesLost
from serve_app.records import Record
from serve_app.store.base import RecordStore, Segments, Unreadable
from serve_app.store.keys import shorten
from serve_app.types import (
    BatchSpec,
    MissingRows,
    PackedExperts,
    RoutedSequence,
)

_MASKABLE = (RoutesLost, KeyExpired)


def materialize(
    store: RecordStore,
    sequences: Sequence[RoutedSequence],
    spec: BatchSpec | None = None,
    out: Array | None = None,
    allocate: Allocate = np.empty,
    pieces: Sequence[Piece] | None = None,
) -> PackedExperts:
    """Turn sequences of keys into ids ``[tokens, layers, top_k]`` and what comes with them.

    ``out`` is filled instead of a new array, which ``allocate`` makes; its shape and dtype must
    fit. With ``on_missing="mask"`` gaps, lost and expired keys become rows with ``valid=False``
    and are listed in ``missing``; otherwise they raise `RoutesGap`, `RoutesLost` or `KeyExpired`.
    Unknown and released keys always raise, and so do records of another model, and splits that
    do not come out even (ValueError). ``pieces`` stands in for the rows of ``spec.rank``, one
    after the other; every sequence is still checked as a whole.
    """
    spec = spec or BatchSpec()
    if not sequences:
        raise ValueError("materialize needs at least one sequence, got none")
    lengths = [sequence.length for sequence in sequences]
    lay_out = cache(
        lambda: rank_rows(lengths, spec) if pieces is None else RankRows(list(pieces), [])
    )
    fetched = store.fetch([sequence.key for sequence in sequences], meanwhile=lay_out)
    readable = [_readable(sequences[i], found, spec) for i, found in enumerate(fetched)]
    model = _one_model(sequences, readable)
    plans = [
        stitch(segments, sequence.first, sequence.length) if segments else None
        for sequence, segments in zip(sequences, readable, strict=True)
    ]
    missing = _missing(sequences, plans, fetched)
    if missing and spec.on_missing == "raise":
        gap = missing[0]
        raise RoutesGap(
            f"key {shorten(sequences[gap.index].key)}: rows {gap.first} to"
            f" {gap.first + gap.count - 1} were never captured"
        )
    rows = lay_out()
    columns = columns_of(model.meta.layers, model.moe_layers, spec)
    shape = (*rows.lead, len(columns), model.meta.top_k)
    ids = destination(out, shape, model.meta.dtype, spec.dtype, allocate)
    valid = np.ones(rows.lead, dtype=np.bool_)
    flat, flat_valid = ids.reshape(rows.rows, *ids.shape[-2:]), valid.reshape(rows.rows)
    padding, copies = Padding(spec, model.num_experts, columns), Copies()
    filling = Filling(
        flat, flat_valid, columns, model.meta, padding, copies, pieces=len(rows.pieces)
    )
    begin = 0
    for number, first, count, at in rows.pieces:
        if number is None or (plan := plans[number]) is None:
            filling.pad(begin, count, at)
        elif run := plan.whole:
            filling.copy(begin, run.segment, run.source + first, count)
        else:
            filling.fill(begin, plan.part(first, count), at)
        begin += count
    copies.run()
    is_moe = set(model.moe_layers)
    moe = tuple(layer for layer in columns if layer in is_moe)
    return PackedExperts(
        ids=ids,
        valid=valid,
        cu_seqlens=np.array(rows.boundaries, dtype=np.int32),
        layers=moe,
        columns=columns,
        num_experts=model.num_experts,
        missing=missing,
        model=_shape(model),
    )


def _readable(
    sequence: RoutedSequence, found: Segments | Unreadable, spec: BatchSpec
) -> Segments | None:
    if isinstance(found, list):
        return found
    if spec.on_missing == "mask" and isinstance(found, _MASKABLE):
        return None
    raise type(found)(f"key {shorten(sequence.key)}: {found}")


def _one_model(sequences: Sequence[RoutedSequence], readable: list[Segments | None]) -> Record:
    """Return any record, after checking that all are of one model."""
    model: Record | None = None
    shape: object = None
    for sequence, segments in zip(sequences, readable, strict=True):
        for record in segments or ():
            if model is None:
                model, shape = record, _shape(record)
            elif _shape(record) != shape:
                raise RecordError(
                    f"key {shorten(sequence.key)} has (layers, top_k, experts, MoE layers)"
                    f" {_shape(record)}, the sequences before it {shape}"
                )
    if model is None:
        raise RoutesLost("none of the sequences has routes left, so not even their shape is known")
    return model


def _shape(record: Record) -> tuple[int, int, int, tuple[int, ...]]:
    return record.meta.layers, record.meta.top_k, record.num_experts, record.moe_layers


def _missing(
    sequences: Sequence[RoutedSequence],
    plans: list[Stitched | None],
    fetched: list[Segments | Unreadable],
) -> tuple[MissingRows, ...]:
    missing: list[MissingRows] = []
    for index, (sequence, plan) in enumerate(zip(sequences, plans, strict=True)):
        if plan is None:
            why = type(fetched[index]).__name__
            missing.append(MissingRows(index, 0, sequence.length, why))
        elif plan.missing:
            missing += [MissingRows(index, *span, "RoutesGap") for span in plan.missing]
    return tuple(missing)
