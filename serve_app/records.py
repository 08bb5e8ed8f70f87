"""The record: which experts served each token of a sequence, and everything about its bytes.

The one module that knows dtype, shape, layer map, hashes and validation. A record's ids are
``[rows, layers, top_k]``, unsigned, logical checkpoint ids; row *j* holds the experts chosen
while the model processed token ``start + j``. P prompt and G returned tokens have P+G-1 rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from serve_app.errors import RecordError

Ids = npt.NDArray[np.unsignedinteger[Any]]
Rows = npt.NDArray[np.bool_]

FORMAT_VERSION = 1
MAX_EXPERTS = 65_535


def narrowest_dtype(num_experts: int) -> np.dtype[Any]:
    """Return uint8 up to 256 experts, uint16 up to 65,535."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise RecordError(f"num_experts must be in [1, {MAX_EXPERTS}], got {num_experts}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@lru_cache(maxsize=256)
def one_tuple(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return one and the same tuple for all equal ones; pickle writes it once, too."""
    return layers


def hash_tokens(tokens: Sequence[int] | npt.NDArray[Any]) -> int:
    """Hash token ids (as little-endian int64), so that an edited prefix is noticed."""
    return int(xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype="<i8").tobytes()))


def checksum(ids: npt.NDArray[Any]) -> int:
    """Return xxh3-64 over the ids' C-order bytes."""
    return int(xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids).view(np.uint8).reshape(-1).data))


class RecordMeta(NamedTuple):
    """Everything about a record but its ids: small enough to travel with every answer.

    A tuple, because an answer about a thousand keys makes a thousand of them.
    ``moe_layers`` are global layer indices; the columns of other layers mean nothing.
    ``invalid`` lists the rows (relative to ``start``) that must route natively. ``raw`` is set by
    `raw_record` alone: the dtype of an array kept as it came, whose ``num_experts`` (then 0)
    nobody said.
    """

    rows: int
    layers: int
    top_k: int
    num_experts: int
    start: int
    moe_layers: tuple[int, ...]
    weight_version: int
    checksum: int
    token_hash: int | None = None
    invalid: tuple[int, ...] = ()
    format_version: int = FORMAT_VERSION
    raw: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype, which the number of experts decides; a raw array's own."""
        return np.dtype(self.raw) if self.raw else narrowest_dtype(self.num_experts)

    @property
    def nbytes(self) -> int:
        """Size of the ids in bytes."""
        return self.rows * self.layers * self.top_k * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Sequence position after the last row."""
        return self.start + self.rows

    def verify(self, ids: npt.NDArray[Any]) -> None:
        """Raise `RecordError` unless ``ids`` are exactly the bytes this header was made for."""
        expected = (self.rows, self.layers, self.top_k)
        if ids.shape != expected or ids.dtype != self.dtype:
            raise RecordError(
                f"record promises {self.dtype}{list(expected)}, got {ids.dtype}{list(ids.shape)}"
            )
        if (found := checksum(ids)) != self.checksum:
            raise RecordError(f"record checksum is {self.checksum:016x}, bytes have {found:016x}")


@dataclass(frozen=True, slots=True)
class Record:
    """A header and its ids ``[rows, layers, top_k]``."""

    meta: RecordMeta
    ids: Ids

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


def make_record(
    ids: npt.ArrayLike,
    *,
    num_experts: int,
    start: int = 0,
    moe_layers: Sequence[int] | None = None,
    weight_version: int = 0,
    tokens: Sequence[int] | None = None,
    valid: Rows | None = None,
) -> Record:
    """Validate ids ``[rows, layers, top_k]`` of any integer dtype and make them a record.

    Narrows to the stored dtype; never clips. ``moe_layers=None`` means every layer. ``tokens``
    are the token ids of the rows, for the prefix check of a continued rollout.
    Raises `RecordError` naming what was expected and what came.
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
    try:
        # plain ints: they become JSON, and one tuple stands for all equal ones
        moe = one_tuple(tuple(map(index, range(layers) if moe_layers is None else moe_layers)))
    except TypeError:
        raise RecordError(f"moe_layers must be integers, got {moe_layers}") from None
    if not moe or list(moe) != sorted(set(moe)) or moe[0] < 0 or moe[-1] >= layers:
        raise RecordError(
            f"moe_layers must be ascending indices below {layers} and not empty, got {moe}"
        )
    if top_k > num_experts:
        raise RecordError(f"top_k {top_k} is larger than num_experts {num_experts}")
    if len(moe) < layers:
        cleared = np.zeros_like(array)
        cleared[:, moe] = array[:, moe]
        array = cleared
    if (low := int(array.min())) < 0 or (high := int(array.max())) >= num_experts:
        bad = low if low < 0 else high
        raise RecordError(f"expert ids must be in [0, {num_experts}), got {bad}")
    if tokens is not None and len(tokens) != rows:
        raise RecordError(f"{rows} rows need {rows} token ids, got {len(tokens)}")
    if valid is not None and valid.shape != (rows,):
        raise RecordError(f"valid must be [{rows}], got {list(valid.shape)}")
    stored: Ids = np.ascontiguousarray(array, dtype=dtype)
    meta = RecordMeta(
        rows=rows,
        layers=layers,
        top_k=top_k,
        num_experts=num_experts,
        start=start,
        moe_layers=moe,
        weight_version=weight_version,
        checksum=checksum(stored),
        token_hash=None if tokens is None else hash_tokens(tokens),
        invalid=() if valid is None else tuple(np.flatnonzero(~valid).tolist()),
    )
    return Record(meta, stored)


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


def part_of(record: Record, first: int, stop: int, tokens: Sequence[int] | None = None) -> Record:
    """Return the rows at sequence positions ``first .. stop`` of a record, as one of its own.

    ``tokens`` are those of the whole sequence, from position 0 on; without them the part has no
    token hash.
    """
    begin, end = first - record.start, stop - record.start
    ids = record.ids[begin:end]
    meta = record.meta._replace(
        rows=len(ids),
        start=first,
        checksum=checksum(ids),
        token_hash=None if tokens is None else hash_tokens(tokens[first:stop]),
        invalid=tuple(row - begin for row in record.meta.invalid if begin <= row < end),
    )
    return Record(meta, ids)


def new_part_of(record: Record, covered: int, tokens: Sequence[int] | None = None) -> Record:
    """Leave out the rows before position ``covered``; the last row stays in any case.

    A record is never empty, and of a row that two records have the earlier capture is read.
    """
    first = min(covered, record.meta.stop - 1)
    return record if first <= record.start else part_of(record, first, record.meta.stop, tokens)
