"""Tracks: other values of the same rows, beside the routes and under the same key.

Dense ones have as many values in each row: ``[rows]`` or ``[rows, ...]``, per layer too. Ragged
ones have any number: the values of row *j* are ``values[offsets[j]:offsets[j + 1]]``. A track is
stored as one buffer, and travels only where somebody asks for it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records.ids import checksum

ROUTES = "routes"
TOKENS = "tokens"
"""``int32 [rows]``: the token that each row was routed for, `UNKNOWN` where nobody said."""
UNKNOWN = -1
ALL_TRACKS = ("*",)
"""Asked for instead of names: whatever tracks a record has."""

MAX_TRACKS = 16
MAX_DIMENSIONS = 4
DTYPES = ("|u1", "|i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<i8", "<f8")
_ITEMSIZE = {dtype: np.dtype(dtype).itemsize for dtype in DTYPES}
_OFFSETS = np.dtype("<i8")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

Buffer = npt.NDArray[np.uint8]
Tracks = Mapping[str, "Track"]
Shape = tuple[int, ...]


class TrackMeta(NamedTuple):
    """Everything about a track but its values.

    ``shape`` is that of a row, or of each value where ``values``, their number, is not None: then
    the track is ragged. ``checksum`` is None where a record is read in part.
    """

    name: str
    dtype: str
    shape: Shape
    values: int | None
    checksum: int | None

    def nbytes(self, rows: int) -> int:
        """Return the size of the buffer."""
        if self.values is None:
            return rows * self._each
        return (rows + 1) * _OFFSETS.itemsize + self.values * self._each

    def over(self, buffer: npt.NDArray[Any] | bytes, rows: int) -> "Track":
        """Return the track of ``rows`` rows that lies in a buffer, not copied.

        The buffer may go on: what it begins with is read.
        """
        flat = np.frombuffer(buffer, np.uint8) if isinstance(buffer, bytes) else buffer
        flat = flat.reshape(-1).view(np.uint8)
        if self.values is None:
            dense = flat[: self.nbytes(rows)].view(self.dtype)
            return Track(dense.reshape(rows, *self.shape))
        head = (rows + 1) * _OFFSETS.itemsize
        offsets = flat[:head].view(_OFFSETS)
        values = flat[head : head + self.values * self._each].view(self.dtype)
        return Track(values.reshape(self.values, *self.shape), offsets)

    @property
    def _each(self) -> int:
        size = _ITEMSIZE[self.dtype]
        return size * math.prod(self.shape) if self.shape else size


@dataclass(frozen=True, slots=True)
class Track:
    """``values`` ``[rows, ...]``, or ``[values, ...]`` with ``offsets`` ``[rows + 1]``."""

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64] | None = None

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def part(self, begin: int, end: int) -> "Track":
        """Return the rows ``begin .. end``; values are not copied."""
        if self.offsets is None:
            return Track(self.values[begin:end])
        offsets = self.offsets[begin : end + 1]
        return Track(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def buffer(self) -> Buffer:
        """Return all of it as bytes; a dense track's are not copied."""
        values = np.ascontiguousarray(self.values).reshape(-1).view(np.uint8)
        if self.offsets is None:
            return values
        head = np.ascontiguousarray(self.offsets, _OFFSETS).view(np.uint8)
        return np.concatenate([head, values])

    def tobytes(self) -> bytes:
        """Return a copy of the buffer."""
        return self.values.tobytes() if self.offsets is None else self.buffer().tobytes()

    def meta(self, name: str) -> TrackMeta:
        """Return what says everything but the values."""
        ragged = self.offsets is not None
        return TrackMeta(
            name,
            self.values.dtype.str,
            self.values.shape[1:],
            len(self.values) if ragged else None,
            checksum(self.buffer()),
        )


def token_track(tokens: Sequence[int] | npt.NDArray[Any], rows: int) -> Track:
    """Return the track of ``rows`` token ids; `RecordError` for what are none."""
    array = np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RecordError(f"expected token ids [rows], got {array.dtype}{list(array.shape)}")
    if len(array) != rows:
        raise RecordError(f"{rows} rows need {rows} token ids, got {len(array)}")
    if rows and not UNKNOWN <= int(array.min()) <= int(array.max()) < 2**31:
        bad = int(array.min()) if array.min() < UNKNOWN else int(array.max())
        raise RecordError(f"expected token ids in [0, 2**31), got {bad}")
    return Track(np.ascontiguousarray(array, "<i4"))


def checked_track(name: str, track: "Track | npt.NDArray[Any]", rows: int) -> Track:
    """Return a track of ``rows`` rows in the form in which it is stored.

    Raises `RecordError` naming the track, what was expected and what came.
    """
    if not _NAME.fullmatch(name) or name == ROUTES:
        raise RecordError(f"expected a track's name in lower case, not {ROUTES!r}, got {name!r}")
    made = track if isinstance(track, Track) else Track(np.asarray(track))
    dtype = made.values.dtype.newbyteorder("<")
    if dtype.str not in DTYPES or made.values.ndim < 1 or made.values.ndim > MAX_DIMENSIONS:
        raise RecordError(
            f"track {name!r}: expected [rows, ...] of {', '.join(DTYPES)} in up to"
            f" {MAX_DIMENSIONS} dimensions, got {made.values.dtype}{list(made.values.shape)}"
        )
    if made.rows != rows:
        raise RecordError(f"track {name!r}: expected {rows} rows, got {made.rows}")
    values = np.ascontiguousarray(made.values, dtype)
    if made.offsets is None:
        return Track(values)
    offsets = np.ascontiguousarray(made.offsets, _OFFSETS)
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise RecordError(
            f"track {name!r}: expected offsets that ascend from 0 to {len(values)},"
            f" got {offsets[0]} to {offsets[-1]}"
        )
    return Track(values, offsets)


def hash_tokens(tokens: Sequence[int] | npt.NDArray[Any]) -> int:
    """Return what a track of these token ids has as its checksum."""
    return checksum(np.ascontiguousarray(tokens, dtype="<i4"))
