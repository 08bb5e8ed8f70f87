"""Keys to a packed tensor: fetch, stitch, lay out. The one path of the client and the decoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.assemble.layout import cumulative, fill
from serve_app.assemble.stitch import Stitched, stitch
from serve_app.errors import KeyExpired, RecordError, RoutesGap, RoutesLost
from serve_app.records import OUTPUT_DTYPES, Record
from serve_app.store.base import RecordStore, Segments, Unreadable
from serve_app.store.keys import shorten
from serve_app.types import MissingRows, OnMissing, OutputDtype, PackedExperts, RoutedSequence

_MASKABLE = (RoutesLost, KeyExpired)


def materialize(
    store: RecordStore,
    sequences: Sequence[RoutedSequence],
    *,
    dtype: OutputDtype | None = None,
    on_missing: OnMissing = "raise",
    out: npt.NDArray[Any] | None = None,
) -> PackedExperts:
    """Turn sequences of keys into ids ``[tokens, layers, top_k]`` and what comes with them.

    ``dtype=None`` keeps the stored width. ``out`` is filled instead of a new array; its shape
    and dtype must fit. With ``on_missing="mask"`` gaps, lost and expired keys become rows with
    ``valid=False`` and are listed in ``missing``; otherwise they raise `RoutesGap`, `RoutesLost`
    or `KeyExpired`. Unknown and released keys always raise, and so do records of another model.
    """
    if not sequences:
        raise ValueError("materialize needs at least one sequence, got none")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype must be one of {OUTPUT_DTYPES}, got {dtype!r}")
    fetched = store.fetch([sequence.key for sequence in sequences])
    readable = [_readable(sequences[i], found, on_missing) for i, found in enumerate(fetched)]
    model = _one_model(sequences, readable)
    plans = [
        stitch(segments, sequence.first, sequence.length) if segments else None
        for sequence, segments in zip(sequences, readable, strict=True)
    ]
    missing = _missing(sequences, plans, fetched)
    if missing and on_missing == "raise":
        gap = missing[0]
        raise RoutesGap(
            f"sequence {gap.index}, key {shorten(sequences[gap.index].key)}: rows {gap.first} to"
            f" {gap.first + gap.count - 1} were never captured"
        )
    boundaries = cumulative([sequence.length for sequence in sequences])
    shape = (int(boundaries[-1]), model.meta.layers, model.meta.top_k)
    ids = _destination(out, shape, model.meta.dtype, dtype)
    valid = np.empty(shape[0], dtype=np.bool_)
    for index, (segments, plan) in enumerate(zip(readable, plans, strict=True)):
        rows = slice(boundaries[index], boundaries[index + 1])
        if segments is None or plan is None:
            ids[rows], valid[rows] = 0, False
        else:
            fill(ids[rows], valid[rows], segments, plan)
    return PackedExperts(ids, valid, boundaries, model.moe_layers, model.num_experts, missing)


def _readable(
    sequence: RoutedSequence, found: Segments | Unreadable, on_missing: OnMissing
) -> Segments | None:
    if isinstance(found, list):
        return found
    if on_missing == "mask" and isinstance(found, _MASKABLE):
        return None
    raise type(found)(f"key {shorten(sequence.key)}: {found}")


def _one_model(sequences: Sequence[RoutedSequence], readable: list[Segments | None]) -> Record:
    """Return any record, after checking that all are of one model."""
    model: Record | None = None
    for sequence, segments in zip(sequences, readable, strict=True):
        for record in segments or ():
            model = model or record
            if _shape(record) != _shape(model):
                raise RecordError(
                    f"key {shorten(sequence.key)} has (layers, top_k, experts, MoE layers)"
                    f" {_shape(record)}, the sequences before it {_shape(model)}"
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
        else:
            missing += [MissingRows(index, *span, "RoutesGap") for span in plan.missing]
    return tuple(missing)


def _destination(
    out: npt.NDArray[Any] | None,
    shape: tuple[int, ...],
    stored: np.dtype[Any],
    asked: OutputDtype | None,
) -> npt.NDArray[Any]:
    dtype = np.dtype(asked) if asked else stored
    if not np.can_cast(stored, dtype, "safe"):
        raise RecordError(f"{dtype} cannot hold every id stored as {stored}")
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.writeable:
        raise ValueError(
            f"out must be a writable {dtype}{list(shape)}, got {out.dtype}{list(out.shape)}"
        )
    return out
