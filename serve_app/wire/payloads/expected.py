"""What is known of a payload before it is read, and the one way from its array to a record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record, make_record, narrowest_dtype, part_of
from serve_app.wire.payloads.refusal import no_rows, refusal

_NATIVE = -1


@dataclass(frozen=True, slots=True)
class Expected:
    """The model, and what the caller knows of one payload.

    ``moe_layers=None`` means every layer, ``rows=None`` any number. ``start`` and
    ``weight_version`` are those of payloads that do not say them; where a payload does, one
    that is not 0 here must be the same. ``extra_rows`` are at the payload's end, beyond ``rows``,
    and are cut: 1 for LMDeploy's key of an answer that ended with a stop token which it does not
    return (P+G rows; its lists have P+G-1). A row that repeats an expert in a MoE layer was
    never routed, and peers fill rows that they lack so: it is invalid and counted, or, with
    ``repeats="refuse"`` where the payload's owner promises all rows, refused. Raises `RecordError`
    if no model is like this.
    """

    layers: int
    top_k: int
    num_experts: int
    moe_layers: tuple[int, ...] | None = None
    rows: int | None = None
    start: int = 0
    weight_version: int = 0
    extra_rows: int = 0
    repeats: Literal["mask", "refuse"] = "mask"

    def __post_init__(self) -> None:
        narrowest_dtype(self.num_experts)
        if self.layers < 1 or not 1 <= self.top_k <= self.num_experts:
            raise RecordError(
                f"expected layers >= 1 and top_k in [1, {self.num_experts}],"
                f" got {self.layers} and {self.top_k}"
            )
        if self.extra_rows < 0:
            raise RecordError(f"expected extra_rows >= 0, got {self.extra_rows}")
        if self.repeats not in ("mask", "refuse"):
            raise refusal("repeats as 'mask' or 'refuse'", self.repeats)
        moe = self.moe
        if not moe or list(moe) != sorted(set(moe)) or moe[0] < 0 or moe[-1] >= self.layers:
            raise refusal(f"moe_layers as ascending indices below {self.layers}", moe)

    @property
    def moe(self) -> tuple[int, ...]:
        """Global indices of the MoE layers."""
        return tuple(range(self.layers)) if self.moe_layers is None else tuple(self.moe_layers)

    @property
    def sent_rows(self) -> int | None:
        """Rows that a payload has, those that are cut included; None for any number."""
        return None if self.rows is None else self.rows + self.extra_rows

    def check_shape(self, shape: Sequence[int], spare: int = 0) -> None:
        """Raise `RecordError` unless ``shape`` is this model's, with all layers or the MoE ones.

        ``spare`` rows more than those that are sent are no error yet: the format's reader knows.
        """
        moe = len(self.moe)
        fits = len(shape) == 3 and shape[1] in (self.layers, moe) and shape[2] == self.top_k
        if fits and shape[0] <= self.extra_rows:
            raise RecordError(
                f"expected more rows than the {self.extra_rows} that are cut, got {shape[0]}"
            )
        sent = self.sent_rows
        if not fits or (sent is not None and shape[0] - sent not in (0, spare)):
            rows = "rows" if sent is None else sent
            only = "" if moe == self.layers else f" or [{rows}, {moe}, {self.top_k}]"
            raise refusal(f"ids [{rows}, {self.layers}, {self.top_k}]{only}", list(shape))

    def check_start(self, start: int) -> None:
        """Raise `RecordError` if a payload's start is not the one that the caller knows."""
        if self.start not in (0, start):
            raise RecordError(f"expected rows from position {self.start} on, got {start}")

    def check(self, record: Record) -> Record:
        """Return a record that is of this model, `RecordError` otherwise."""
        meta = record.meta
        if record.num_experts != self.num_experts:
            raise RecordError(
                f"expected routes of {self.num_experts} experts, got {record.num_experts}"
            )
        if (meta.layers, meta.top_k) != (self.layers, self.top_k):
            raise refusal(
                f"ids [rows, {self.layers}, {self.top_k}]", [meta.rows, meta.layers, meta.top_k]
            )
        if self.sent_rows not in (None, meta.rows) or meta.rows <= self.extra_rows:
            raise RecordError(
                f"expected {self.sent_rows or f'over {self.extra_rows}'} rows, got {meta.rows}"
            )
        if meta.moe_layers != self.moe:
            raise refusal(f"MoE layers {list(self.moe)}", meta.moe_layers)
        self.check_start(meta.start)
        if self.weight_version not in (0, meta.weight_version):
            raise RecordError(
                f"expected weight version {self.weight_version}, got {meta.weight_version}"
            )
        if self.extra_rows:
            record = part_of(record, meta.start, meta.stop - self.extra_rows)
        if self.repeats == "refuse" and record.meta.unrouted:
            raise RecordError(
                f"expected {self.top_k} different experts in each MoE layer of every row, got"
                f" {record.meta.unrouted} rows that repeat one"
            )
        return record

    def to_record(self, ids: npt.NDArray[Any], *, start: int | None = None) -> Record:
        """Return the record of integer ids ``[rows, layers or MoE layers, top_k]``.

        Columns of dense layers may hold what engines leave there, zeros or all bits set
        (LMDeploy: 65535), and nothing else: real ids in them mean another model. A row of -1
        routes natively; a row that is -1 in part is damaged. So is a payload without one row that
        was routed, whatever fills it.
        """
        if ids.ndim and not len(ids):
            raise no_rows(ids)
        if ids.dtype.kind not in "iu":
            raise refusal("integer ids", ids)
        self.check_shape(ids.shape)
        ids = ids[: len(ids) - self.extra_rows]
        moe = list(self.moe)
        if ids.shape[1] != len(moe):
            self._check_dense(ids)
            ids = ids[:, moe]
        ids, valid = _without_native(ids)
        if len(moe) < self.layers:
            wide = np.zeros((ids.shape[0], self.layers, self.top_k), ids.dtype)
            wide[:, moe] = ids
            ids = wide
        return make_record(
            ids,
            num_experts=self.num_experts,
            start=self.start if start is None else start,
            moe_layers=moe,
            weight_version=self.weight_version,
            valid=valid,
            repeats=self.repeats,
        )

    def _check_dense(self, ids: npt.NDArray[Any]) -> None:
        dense = sorted(set(range(self.layers)) - set(self.moe))
        columns = ids[:, dense]
        # Written as uint16, and seen in whatever dtype an older client widened it to.
        blank = (columns == 0) | (columns == np.array(_NATIVE).astype(ids.dtype))
        if ids.dtype.itemsize > 2:
            blank |= columns == 0xFFFF
        if not blank.all():
            row, column, _ = np.argwhere(~blank)[0].tolist()
            bad = int(columns[~blank][0])
            raise RecordError(
                f"expected 0 or 65535 in dense layer {dense[column]}, got expert {bad} in row"
                f" {row}: does moe_layers describe the model that wrote this?"
            )


def _without_native(
    ids: npt.NDArray[Any],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    if ids.dtype.kind == "u" or (ids != _NATIVE).all():
        return ids, None
    blank = ids == _NATIVE
    whole = blank.all(axis=(1, 2))
    if damaged := np.flatnonzero(blank.any(axis=(1, 2)) & ~whole).tolist():
        raise RecordError(f"expected a row of ids or a row of -1, got row {damaged[0]} with both")
    if whole.all():
        raise RecordError(f"expected routes, got all -1: none of {len(ids)} rows was routed")
    return np.where(whole[:, None, None], ids.dtype.type(0), ids), ~whole
