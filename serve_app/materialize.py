"""Keys to a packed tensor: fetch, stitch, lay out. The one path of the client and the decoder."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from serve_app.assemble.beside import Beside
from serve_app.assemble.copying import Copies
from serve_app.assemble.destination import Allocate, Array, destination
from serve_app.assemble.layout import Filling, columns_of
from serve_app.assemble.padding import Padding
from serve_app.assemble.ranks import Piece, RankRows, rank_rows
from serve_app.assemble.stitch import Stitched, stitch
from serve_app.errors import KeyExpired, ModelUnknown, RecordError, RoutesGap, RoutesLost
from serve_app.records import RecordMeta
from serve_app.store.base import Meanwhile, RecordStore, Segments, Unreadable
from serve_app.store.keys import shorten
from serve_app.types import (
    BatchSpec,
    MissingRows,
    ModelShape,
    PackedExperts,
    RoutedSequence,
)

_MASKABLE = (RoutesLost, KeyExpired)
NO_ROUTES = "NoRoutes"
"""Why rows are missing of a sequence that came without a key."""


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
    fit. With ``on_missing="mask"`` gaps, lost and expired keys and sequences without a key become
    rows with ``valid=False`` and are listed in ``missing``; otherwise they raise `RoutesGap`,
    `RoutesLost` or `KeyExpired`. Where nothing else is left ``spec.model`` says their shape, else
    that is `ModelUnknown`.
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
    fetched = _fetched(store, sequences, lay_out, spec)
    readable = [_readable(sequences[i], found, spec) for i, found in enumerate(fetched)]
    model = _one_model(sequences, readable, spec.model)
    plans = [
        stitch(segments, sequence.first, sequence.length) if segments else None
        for sequence, segments in zip(sequences, readable, strict=True)
    ]
    missing = _missing(sequences, plans, fetched)
    if missing and spec.on_missing == "raise":
        gap = missing[0]
        if sequences[gap.index].key is None:
            raise RoutesGap(
                f"sequence {gap.index} has no key: expected one, or on_missing='mask' for rollouts"
                " without routes"
            )
        raise RoutesGap(
            f"key {shorten(sequences[gap.index].key or '')}: rows {gap.first} to"
            f" {gap.first + gap.count - 1} were never captured"
        )
    rows = lay_out()
    columns = columns_of(model.layers, model.moe_layers, spec)
    shape = (*rows.lead, len(columns), model.top_k)
    ids = destination(out, shape, model.dtype, spec.dtype, allocate)
    valid = np.ones(rows.lead, dtype=np.bool_)
    flat, flat_valid = ids.reshape(rows.rows, *ids.shape[-2:]), valid.reshape(rows.rows)
    padding, copies = Padding(spec, model.num_experts, columns), Copies()
    versions = {record.meta.weight_version for segments in readable for record in segments or ()}
    beside = Beside(rows.rows, versions, tokens="tokens" in spec.tracks)
    varied = None if beside.is_alike else beside
    filling = Filling(
        flat, flat_valid, columns, model, padding, copies, pieces=len(rows.pieces), beside=varied
    )
    begin = 0
    for number, first, count, at in rows.pieces:
        if number is None or (plan := plans[number]) is None:
            filling.pad(begin, count, at)
        elif run := plan.whole:
            filling.copy(begin, run.segment, run.source + first, count, at)
        else:
            filling.fill(begin, plan.part(first, count), at)
        begin += count
    copies.run()
    filling.pad_native()
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
        versions=beside.versions,
        version_of=beside.version_of.reshape(rows.lead),
        tokens=None if beside.tokens is None else beside.tokens.reshape(rows.lead),
        unrouted=filling.unrouted,
        not_valid=filling.native - filling.unrouted,
    )


def _fetched(
    store: RecordStore,
    sequences: Sequence[RoutedSequence],
    meanwhile: Meanwhile,
    spec: BatchSpec,
) -> list[Segments | Unreadable | None]:
    """Return what each sequence's key reads as, None for those without one."""
    keys = [sequence.key for sequence in sequences if sequence.key is not None]
    if len(keys) == len(sequences):
        return [*store.fetch(keys, meanwhile, spec.tracks)]
    found = iter(store.fetch(keys, meanwhile, spec.tracks) if keys else ())
    return [None if sequence.key is None else next(found) for sequence in sequences]


def _named(sequence: RoutedSequence) -> str:
    return shorten(sequence.key or "")


def _readable(
    sequence: RoutedSequence, found: Segments | Unreadable | None, spec: BatchSpec
) -> Segments | None:
    if isinstance(found, list) or found is None:
        return found
    if spec.on_missing == "mask" and isinstance(found, _MASKABLE):
        return None
    raise type(found)(f"key {_named(sequence)}: {found}")


def _one_model(
    sequences: Sequence[RoutedSequence],
    readable: list[Segments | None],
    expected: ModelShape | None,
) -> RecordMeta:
    """Return any record's header, after checking that all are of one model, the expected one."""
    model: RecordMeta | None = None
    shape: object = None
    if expected is not None:
        model = _header_of(expected)
        shape = _shape(model)
    for sequence, segments in zip(sequences, readable, strict=True):
        for record in segments or ():
            meta = record.meta
            if model is None:
                _ = record.num_experts  # an array whose experts nobody named raises here
                model, shape = meta, _shape(meta)
            elif _shape(meta) != shape:
                _ = record.num_experts
                before = "the sequences before it" if expected is None else "the expected model"
                raise RecordError(
                    f"key {_named(sequence)} has (layers, top_k, experts, MoE layers)"
                    f" {_shape(meta)}, {before} {shape}"
                )
    if model is None:
        raise ModelUnknown(
            "none of the sequences has routes left, so not even their shape is known: expected"
            " model=ModelShape(...)"
        )
    return model


def _header_of(model: ModelShape) -> RecordMeta:
    return RecordMeta(
        rows=0,
        layers=model.layers,
        top_k=model.top_k,
        num_experts=model.num_experts,
        start=0,
        moe_layers=tuple(model.moe),
        weight_version=0,
        checksum=0,
    )


def _shape(meta: RecordMeta) -> tuple[int, int, int, tuple[int, ...]]:
    return meta.layers, meta.top_k, meta.num_experts, meta.moe_layers


def _missing(
    sequences: Sequence[RoutedSequence],
    plans: list[Stitched | None],
    fetched: list[Segments | Unreadable | None],
) -> tuple[MissingRows, ...]:
    missing: list[MissingRows] = []
    for index, (sequence, plan) in enumerate(zip(sequences, plans, strict=True)):
        if plan is None:
            why = NO_ROUTES if fetched[index] is None else type(fetched[index]).__name__
            missing.append(MissingRows(index, 0, sequence.length, why))
        elif plan.missing:
            missing += [MissingRows(index, *span, "RoutesGap") for span in plan.missing]
    return tuple(missing)
