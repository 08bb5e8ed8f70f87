"""The record: which experts served each token of a sequence, and what else is known of its rows.

A record's ids are ``[rows, layers, top_k]``, unsigned, logical checkpoint ids; row *j* holds the
experts chosen while the model processed token ``start + j``. P prompt and G returned tokens have
P+G-1 rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records.distinct import (
    repeating_rows,
    repeating_rows_of_ours,
    what_it_looks_like,
)
from serve_app.records.ids import Ids, Rows, checksum, narrowest_dtype, one_tuple
from serve_app.records.meta import RecordMeta
from serve_app.records.tracks import (
    MAX_TRACKS,
    TOKENS,
    Track,
    Tracks,
    checked_track,
    token_track,
)

Repeats = Literal["mask", "refuse", "ours"]


@dataclass(frozen=True, slots=True)
class Record:
    """A header, its ids ``[rows, layers, top_k]``, and those of its tracks that were asked for."""

    meta: RecordMeta
    ids: Ids
    tracks: Tracks = field(default_factory=dict)

    @property
    def start(self) -> int:
        """Sequence position of the first row."""
        return self.meta.start

    @property
    def num_experts(self) -> int:
        """Number of routed experts a layer; raises `RecordError` for a raw array.

        So nothing is materialized from ids that were never checked against a model.
        """
        if self.meta.raw:
            raise RecordError(
                "expected a record of known experts, got an array put through shared_store as it"
                " was, sentinels of dense layers included: read it there, or put its ids anew with"
                " num_experts and moe_layers"
            )
        return self.meta.num_experts

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global indices of the layers whose columns mean something."""
        return self.meta.moe_layers

    @property
    def weight_version(self) -> int:
        """Version of the weights that chose these experts."""
        return self.meta.weight_version

    @property
    def valid(self) -> Rows:
        """Bool ``[rows]``: False where a row must route natively."""
        valid = np.ones(self.meta.rows, dtype=np.bool_)
        valid[list(self.meta.invalid)] = False
        return valid

    @property
    def tokens(self) -> npt.NDArray[np.int32] | None:
        """The rows' token ids ``int32 [rows]``, -1 where unknown; None if nobody said any."""
        found = self.tracks.get(TOKENS)
        return None if found is None else found.values

    def first(self, rows: int) -> "Record":
        """Return the first ``rows`` rows, to read; nothing is copied and nothing sealed anew."""
        if rows == self.meta.rows:
            return self
        tracks = {name: track.part(0, rows) for name, track in self.tracks.items()}
        return Record(self.meta.first(rows), self.ids[:rows], tracks)


def make_record(
    ids: npt.ArrayLike,
    *,
    num_experts: int,
    start: int = 0,
    moe_layers: Sequence[int] | None = None,
    weight_version: int = 0,
    tokens: Sequence[int] | npt.NDArray[Any] | None = None,
    valid: Rows | None = None,
    tracks: Mapping[str, Track | npt.NDArray[Any]] | None = None,
    repeats: Repeats = "mask",
) -> Record:
    """Validate ids ``[rows, layers, top_k]`` of any integer dtype and make them a record.

    Narrows to the stored dtype; never clips. ``moe_layers=None`` means every layer. ``tokens``
    are the token ids of the rows, by which sequences are compared; ``tracks`` what else is to be
    kept of them. A row that repeats an expert in a MoE layer was never routed: it is
    ``valid=False`` and counted, refused with ``repeats="refuse"``; an array without one real row
    is refused in any case. ``"ours"`` is for what an engine of r3serve recorded, of which a part
    is looked at. Raises `RecordError` naming what was expected and what came.
    """
    array = np.asarray(ids)
    if array.ndim != 3 or 0 in array.shape:
        raise RecordError(f"ids must be [rows, layers, top_k], none of them 0, got {array.shape}")
    if array.dtype.kind not in "iu":
        raise RecordError(f"ids must be integers, got {array.dtype}")
    if start < 0:
        raise RecordError(f"start must be >= 0, got {start}")
    dtype = narrowest_dtype(num_experts)
    rows, layers, top_k = array.shape
    moe = _moe_layers(moe_layers, layers)
    if top_k > num_experts:
        raise RecordError(f"top_k {top_k} is larger than num_experts {num_experts}")
    if len(moe) < layers:
        cleared = np.zeros_like(array)
        cleared[:, moe] = array[:, moe]
        array = cleared
    if (low := int(array.min())) < 0 or (high := int(array.max())) >= num_experts:
        bad = low if low < 0 else high
        whole = f", {what_it_looks_like(array)}" if (array[:, moe] == bad).all() else ""
        raise RecordError(f"expert ids must be in [0, {num_experts}), got {bad}{whole}")
    if valid is not None and valid.shape != (rows,):
        raise RecordError(f"valid must be [{rows}], got {list(valid.shape)}")
    stored: Ids = np.ascontiguousarray(array, dtype=dtype)
    invalid, unrouted = _invalid(stored, moe, valid, repeats, start)
    kept = _tracks(tokens, tracks, rows)
    meta = RecordMeta(
        rows=rows,
        layers=layers,
        top_k=top_k,
        num_experts=num_experts,
        start=start,
        moe_layers=moe,
        weight_version=weight_version,
        checksum=checksum(stored),
        invalid=invalid,
        unrouted_rows=unrouted,
        tracks=tuple(track.meta(name) for name, track in kept.items()),
    )
    return Record(meta, stored, kept)


def raw_record(array: object) -> Record:
    """Keep an integer array ``[rows, layers, top_k]`` of a model that nobody named, unchanged.

    Its values and dtype come back exactly, sentinels included; nothing is known about them.
    Raises `RecordError` naming what was expected and what came.
    """
    ids = np.asarray(array)
    if ids.ndim != 3 or 0 in ids.shape or ids.dtype.kind not in "iu":
        raise RecordError(
            "expected an integer array [rows, layers, top_k], none of them 0,"
            f" got {ids.dtype}{list(ids.shape)}"
        )
    ids = np.ascontiguousarray(ids)
    rows, layers, top_k = ids.shape
    meta = RecordMeta(
        rows=rows,
        layers=layers,
        top_k=top_k,
        num_experts=0,
        start=0,
        moe_layers=one_tuple(tuple(range(layers))),
        weight_version=0,
        checksum=checksum(ids),
        raw=ids.dtype.str,
    )
    return Record(meta, ids)


def _moe_layers(given: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    try:
        # plain ints: they become JSON, and one tuple stands for all equal ones
        moe = one_tuple(tuple(map(index, range(layers) if given is None else given)))
    except TypeError:
        raise RecordError(f"moe_layers must be integers, got {given}") from None
    if not moe or list(moe) != sorted(set(moe)) or moe[0] < 0 or moe[-1] >= layers:
        raise RecordError(
            f"moe_layers must be ascending indices below {layers} and not empty, got {moe}"
        )
    return moe


def _invalid(
    ids: Ids, moe: tuple[int, ...], valid: Rows | None, repeats: Repeats, start: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the rows that must route natively, and those of them that nobody routed."""
    look = repeating_rows_of_ours if repeats == "ours" else repeating_rows
    unrouted = look(ids, moe)
    if valid is not None:
        unrouted &= valid
    count = int(unrouted.sum())
    if not count:
        return () if valid is None else tuple(np.flatnonzero(~valid).tolist()), ()
    native = unrouted if valid is None else unrouted | ~valid
    if native.all():
        raise RecordError(
            f"expected routes, got {what_it_looks_like(ids[:, list(moe)])}: none of {len(ids)} rows"
            f" has {ids.shape[-1]} different experts in each MoE layer"
        )
    if repeats == "refuse":
        row = int(unrouted.argmax())
        raise RecordError(
            f"expected {ids.shape[-1]} different experts in each MoE layer of every row, got"
            f" {count} rows that repeat one, the first at position {start + row}"
        )
    return tuple(np.flatnonzero(native).tolist()), tuple(np.flatnonzero(unrouted).tolist())


def _tracks(
    tokens: Sequence[int] | npt.NDArray[Any] | None,
    tracks: Mapping[str, Track | npt.NDArray[Any]] | None,
    rows: int,
) -> Tracks:
    if tokens is None and not tracks:
        return {}
    kept: dict[str, Track] = {}
    if tokens is not None:
        kept[TOKENS] = token_track(tokens, rows)
    for name, track in (tracks or {}).items():
        if name == TOKENS:
            if tokens is not None:
                raise RecordError("expected tokens once, got them as a track, too")
            values = track.values if isinstance(track, Track) else track
            if isinstance(track, Track) and track.offsets is not None:
                raise RecordError("expected a token a row, got a ragged track of them")
            kept[name] = token_track(values, rows)
        else:
            kept[name] = checked_track(name, track, rows)
    if len(kept) > MAX_TRACKS:
        raise RecordError(f"expected at most {MAX_TRACKS} tracks, got {len(kept)}")
    return kept
