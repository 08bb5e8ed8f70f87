"""Forms in which routes leave over HTTP, chosen by ``Accept``."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from serve_app.ingress.guard.errors import NotAcceptable
from serve_app.records import Record
from serve_app.types import PackedExperts
from serve_app.wire.formats.ours import to_bytes

OURS = "application/vnd.r3serve.record"
NPY = "application/x-npy"
SAFETENSORS = "application/vnd.safetensors"
OF_RECORDS = (OURS, NPY, SAFETENSORS)
OF_BATCHES = (SAFETENSORS, NPY)
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Encoded:
    """Bytes to be streamed, in as many parts as they lie in memory."""

    kind: str
    parts: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return sum(part.nbytes for part in self.parts)

    def pieces(self) -> Iterator[bytes]:
        """Yield pieces small enough that no reader needs much memory."""
        for part in self.parts:
            for first in range(0, part.nbytes, _PIECE):
                yield bytes(part[first : first + _PIECE])


def acceptable(accept: str | None, kinds: Sequence[str]) -> str:
    """Return which of ``kinds`` a client would rather have; the first one if it does not care.

    Raises `NotAcceptable` where it takes none of them.
    """
    best, weight = None, 0.0
    for place in (accept or "*/*").split(","):
        wanted, *options = (piece.strip().lower() for piece in place.split(";"))
        quality = _quality(options)
        for kind in kinds:
            fits = wanted in (kind, "*/*", "application/*", "application/octet-stream")
            if fits and quality > weight:
                best, weight = kind, quality
    if best is None:
        raise NotAcceptable(f"expected to accept one of {', '.join(kinds)}, got {accept!r}")
    return best


def encode_record(record: Record, kind: str) -> Encoded:
    """Return a record in one of `OF_RECORDS`."""
    if kind == OURS:
        return Encoded(kind, (memoryview(to_bytes(record)),))
    if kind == NPY:
        return Encoded(kind, _npy(record.ids))
    meta = {
        "start": str(record.start),
        "num_experts": str(record.num_experts),
        "moe_layers": json.dumps(record.moe_layers),
        "weight_version": str(record.weight_version),
    }
    return Encoded(kind, _tensors({"ids": record.ids, "valid": record.valid}, meta))


def encode_batch(batch: PackedExperts, kind: str) -> Encoded:
    """Return a materialized batch in one of `OF_BATCHES`; ``.npy`` is the ids alone."""
    if kind == NPY:
        return Encoded(kind, _npy(batch.ids))
    missing = [[gap.index, gap.first, gap.count, gap.reason] for gap in batch.missing]
    meta = {
        "layers": json.dumps(batch.layers),
        "columns": json.dumps(batch.columns),
        "num_experts": str(batch.num_experts),
        "missing": json.dumps(missing),
    }
    tensors = {"ids": batch.ids, "valid": batch.valid, "cu_seqlens": batch.cu_seqlens}
    if batch.tokens is not None:
        tensors["tokens"] = batch.tokens
    return Encoded(kind, _tensors(tensors, meta))


def _quality(options: Sequence[str]) -> float:
    for option in options:
        if option.startswith("q="):
            try:
                return float(option[2:])
            except ValueError:
                return 0.0
    return 1.0


def _npy(ids: npt.NDArray[Any]) -> tuple[memoryview, ...]:
    head, ids = io.BytesIO(), np.ascontiguousarray(ids)
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(ids))
    return (head.getbuffer(), _flat(ids))


def _flat(ids: npt.NDArray[Any]) -> memoryview:
    return ids.reshape(-1).view(np.uint8).data


def _tensors(tensors: dict[str, npt.NDArray[Any]], meta: dict[str, str]) -> tuple[memoryview, ...]:
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return (memoryview(save(whole, meta)),)
