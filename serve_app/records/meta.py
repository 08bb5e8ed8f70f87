"""The header of a record: everything about it but its values."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records.ids import checksum, narrowest_dtype
from serve_app.records.tracks import ROUTES, TOKENS, Track, TrackMeta

FORMAT_VERSION = 2


class RecordMeta(NamedTuple):
    """Everything about a record but its ids and tracks: it travels with every answer.

    A tuple, because an answer about a thousand keys makes a thousand of them.
    ``moe_layers`` are global layer indices; the columns of other layers mean nothing.
    ``invalid`` lists the rows (relative to ``start``) that must route natively, ``unrouted_rows``
    those of them that were no router's choice. ``raw`` is set by `raw_record` alone: the dtype of
    an array kept as it came, whose ``num_experts`` (then 0) nobody said. ``tracks`` comes last,
    so that readers of routes alone are spared it.
    """

    rows: int
    layers: int
    top_k: int
    num_experts: int
    start: int
    moe_layers: tuple[int, ...]
    weight_version: int
    checksum: int
    invalid: tuple[int, ...] = ()
    unrouted_rows: tuple[int, ...] = ()
    format_version: int = FORMAT_VERSION
    raw: str | None = None
    tracks: tuple[TrackMeta, ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype, which the number of experts decides; a raw array's own."""
        return np.dtype(self.raw) if self.raw else narrowest_dtype(self.num_experts)

    @property
    def ids_nbytes(self) -> int:
        """Size of the ids in bytes."""
        return self.rows * self.layers * self.top_k * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size of ids and tracks in bytes."""
        nbytes = self.ids_nbytes
        for track in self.tracks:  # no generator: this is asked for every record, several times
            nbytes += track.nbytes(self.rows)
        return nbytes

    @property
    def unrouted(self) -> int:
        """How many rows were no router's choice."""
        return len(self.unrouted_rows)

    @property
    def stop(self) -> int:
        """Sequence position after the last row."""
        return self.start + self.rows

    @property
    def token_hash(self) -> int | None:
        """`serve_app.records.hash_tokens` of the rows' tokens, None where they are unknown."""
        found = self.track(TOKENS)
        return None if found is None else found.checksum

    def size_of(self, column: str) -> int:
        """Return the size in bytes of the ids (`ROUTES`) or of a track."""
        if column == ROUTES:
            return self.ids_nbytes
        found = self.track(column)
        return 0 if found is None else found.nbytes(self.rows)

    def track(self, name: str) -> TrackMeta | None:
        """Return a track's header, None if the record has none of that name."""
        return next((track for track in self.tracks if track.name == name), None)

    def first(self, rows: int) -> "RecordMeta":
        """Return what is known of the first ``rows`` rows without looking at them.

        Its tracks have no checksum, and the ids' is still that of the whole: a header to read by,
        not to store.
        """
        tracks = tuple(track._replace(checksum=None) for track in self.tracks)
        return self.cut(0, rows)._replace(tracks=tracks)

    def cut(self, first: int, stop: int) -> "RecordMeta":
        """Return it for rows ``first .. stop`` alone; the seals stay those of the whole."""
        return self._replace(
            rows=stop - first,
            start=self.start + first,
            invalid=_between(self.invalid, first, stop),
            unrouted_rows=_between(self.unrouted_rows, first, stop),
        )

    def verify(self, ids: npt.NDArray[Any], tracks: "dict[str, Track] | None" = None) -> None:
        """Raise `RecordError` unless ids and tracks are the bytes this header was made for."""
        expected = (self.rows, self.layers, self.top_k)
        if ids.shape != expected or ids.dtype != self.dtype:
            raise RecordError(
                f"record promises {self.dtype}{list(expected)}, got {ids.dtype}{list(ids.shape)}"
            )
        if (found := checksum(ids)) != self.checksum:
            raise RecordError(f"record checksum is {self.checksum:016x}, bytes have {found:016x}")
        for name, track in (tracks or {}).items():
            promised = self.track(name)
            if promised is None or promised != track.meta(name):
                raise RecordError(f"record promises track {promised}, got {track.meta(name)}")


def _between(rows: tuple[int, ...], first: int, stop: int) -> tuple[int, ...]:
    return tuple(row - first for row in rows if first <= row < stop)
