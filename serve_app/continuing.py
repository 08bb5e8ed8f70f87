"""Records that continue others: where two sequences part, and putting new rows only.

A key reads as its whole sequence, and the earliest capture of a row wins. So a child of a parent
on the same shard stores only the rows that its parent lacks; elsewhere the parent's are copied
beside it, each part with its own version. Tokens are compared wherever both sides have them: rows
that were captured on other tokens are another sequence's.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serve_app.errors import PrefixMismatch, RecordError
from serve_app.records import (
    ALL_TRACKS,
    TOKENS,
    UNKNOWN,
    Record,
    RecordMeta,
    TrackMeta,
    hash_tokens,
    new_part_of,
    part_of,
)
from serve_app.store.base import RecordStore, Segments
from serve_app.store.keys import shorten
from serve_app.types import OnDivergence

Tokens = Sequence[int] | npt.NDArray[Any]


class Parting(NamedTuple):
    """The first position at which two sequences have different tokens."""

    position: int
    captured: int
    given: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A key's sequence beside another's tokens.

    ``covered`` rows of it, from row 0 on, have no gap, and ``end`` is the position after its last;
    ``unknown`` is the first position at which both have a row and one of them no token.
    """

    covered: int
    end: int
    parting: Parting | None = None
    unknown: int | None = None

    @property
    def common(self) -> int:
        """How many rows, from row 0 on, are known to be of the same tokens."""
        ends = [self.covered]
        if self.parting is not None:
            ends.append(self.parting.position)
        if self.unknown is not None:
            ends.append(self.unknown)
        return min(ends)

    def check_same(self, what: str) -> None:
        """Raise `PrefixMismatch` that says where the two part."""
        if self.parting is not None:
            at, captured, given = self.parting
            raise PrefixMismatch(
                f"{what}: they part at position {at}: expected token {captured}, on which it was"
                f" captured, got {given}"
            )

    def check_known(self, what: str) -> None:
        """Raise `PrefixMismatch` where a token is unknown that had to be compared."""
        if self.unknown is not None:
            raise PrefixMismatch(
                f"{what}: expected the tokens that it was captured on, it was put without tokens"
                f" from position {self.unknown} on"
            )


def covered(chain: Sequence[RecordMeta]) -> int:
    """Return how many rows, from row 0 on, a key's segments cover without a gap."""
    rows = 0
    for meta in sorted(chain, key=lambda meta: meta.start):
        if meta.start > rows:
            break
        rows = max(rows, meta.stop)
    return rows


def same_by_hash(chain: Sequence[RecordMeta], tokens: Tokens, first: int = 0) -> bool:
    """Tell from headers alone that all of a chain was captured on these tokens.

    ``tokens`` are those from position ``first`` on. False says nothing.
    """
    given, stop = np.asarray(tokens, np.int64), first + len(tokens)
    if not ((given >= 0) & (given < 2**31)).all():
        return False  # unknown ones prove nothing, and others never were tokens
    return all(
        meta.token_hash is not None
        and first <= meta.start
        and meta.stop <= stop
        and meta.token_hash == hash_tokens(given[meta.start - first : meta.stop - first])
        for meta in chain
    )


def end_of(chain: Sequence[RecordMeta]) -> int:
    """Return the position after the last row that a key's segments have, gaps or not."""
    return max(meta.stop for meta in chain)


def captured(chain: Sequence[RecordMeta], rows: int) -> int:
    """Leave out of a chain's first ``rows`` those at their end that nobody captured.

    A row that must route natively is no capture, so that a later one of it counts.
    """
    while rows:
        meta = next(one for one in chain if one.start < rows <= one.stop)
        if rows - 1 - meta.start not in meta.invalid:
            break
        rows -= 1
    return rows


def compare(
    store: RecordStore, key: str, chain: Sequence[RecordMeta], tokens: Tokens, first: int = 0
) -> Compared:
    """Compare a key's sequence with tokens, those from position ``first`` on.

    The key's own tokens are fetched only where hashes do not tell. Blocks. Raises why the key
    cannot be read.
    """
    rows, last = covered(chain), end_of(chain)
    if same_by_hash(chain, tokens, first):
        return Compared(rows, last)
    parts = store.fetch_track(key, TOKENS)
    if not isinstance(parts, list):
        raise type(parts)(f"{shorten(key)}: {parts}")
    given = np.asarray(tokens, np.int64)
    partings: list[Parting] = []
    unknown: list[int] = []
    for meta, track in parts:
        begin, end = max(meta.start, first), min(meta.stop, first + len(given))
        if begin >= end:
            continue
        if track is None:
            unknown.append(begin)
            continue
        here = track.values[begin - meta.start : end - meta.start]
        there = given[begin - first : end - first]
        blank = (here == UNKNOWN) | (there == UNKNOWN)
        unknown += (begin + np.flatnonzero(blank)[:1]).tolist()
        if len(other := np.flatnonzero((here != there) & ~blank)):
            at = int(other[0])
            partings.append(Parting(begin + at, int(here[at]), int(there[at])))
    return Compared(rows, last, min(partings, default=None), min(unknown, default=None))


@dataclass(frozen=True, slots=True)
class Continued:
    """A record's key, and how many rows of its sequence are its parent's."""

    key: str
    rows: int


def put_continued(
    store: RecordStore,
    record: Record,
    parent: str,
    on_divergence: OnDivergence = "raise",
    *,
    tag: str | None = None,
    lease_s: float | None = None,
) -> Continued:
    """Put a record whose key reads as the parent's sequence and then its own.

    With ``on_divergence="prefix"`` the parent's rows end where tokens part. Raises why ``parent``
    cannot be read, `RecordError` if it is of another model, and `PrefixMismatch` where tokens part
    (``"raise"``).
    """
    (chain,) = store.describe([parent])
    what = f"parent {shorten(parent)}"
    if not isinstance(chain, list):
        raise type(chain)(f"{what}: {chain}")
    _check_model(record, chain, parent)
    rows, cut = _rows_taken(store, record, parent, chain, on_divergence)
    if cut == 0:
        return Continued(store.put(record, tag=tag, lease_s=lease_s), 0)
    new = new_part_of(record, rows)
    if store.is_local(parent):
        key = store.put(new, tag=tag, lease_s=lease_s, parent=parent, parent_rows=cut)
        return Continued(key, rows)
    (segments,) = store.fetch([parent], tracks=ALL_TRACKS)
    if not isinstance(segments, list):
        raise type(segments)(f"{what}: {segments}")
    copies: list[str] = []
    try:
        for segment in up_to(segments, cut):
            above = copies[-1] if copies else None
            copies.append(store.put(segment, lease_s=lease_s, parent=above))
        return Continued(store.put(new, tag=tag, lease_s=lease_s, parent=copies[-1]), rows)
    finally:
        store.release(copies)  # the child keeps what it needs of them


def up_to(segments: Segments, stop: int | None) -> Segments:
    """Return a chain's segments up to position ``stop``, each fit to be put anew.

    All but a key's own record may have been read in part, under a header of the whole; and it may
    end before those that it continues.
    """
    end = end_of([segment.meta for segment in segments]) if stop is None else stop
    return [
        segment
        if segment is segments[-1] and segment.meta.stop <= end
        else part_of(segment, segment.start, min(segment.meta.stop, end))
        for segment in segments
        if segment.start < end
    ]


def _rows_taken(
    store: RecordStore,
    record: Record,
    parent: str,
    chain: Sequence[RecordMeta],
    on_divergence: OnDivergence,
) -> tuple[int, int | None]:
    """Return how many of the parent's rows the record's sequence begins with.

    And where the parent's end for it, None for its own end.
    """
    tokens, what = record.tokens, f"parent {shorten(parent)}"
    if on_divergence == "raise":
        if tokens is not None:
            compare(store, parent, chain, tokens, record.start).check_same(what)
        rows, end = covered(chain), end_of(chain)
        real = captured(chain, rows) if rows == end else rows
        return (real, real) if record.start <= real < rows < record.meta.stop + 1 else (rows, None)
    if tokens is None:
        raise RecordError(
            f"{what}: on_divergence='prefix' compares tokens, expected those of"
            f" {record.meta.rows} rows, got none"
        )
    found = compare(store, parent, chain, tokens, record.start)
    rows = min(found.common, record.meta.stop)
    if record.start <= (real := captured(chain, rows)):
        rows = real
    return rows, rows if rows < found.end else None


def _check_model(record: Record, chain: Sequence[RecordMeta], key: str) -> None:
    parent = chain[0]
    new = (record.meta.layers, record.meta.top_k, record.num_experts, record.moe_layers)
    old = (parent.layers, parent.top_k, parent.num_experts, parent.moe_layers)
    if new != old:
        raise RecordError(
            f"parent {shorten(key)} has (layers, top_k, experts, MoE layers) {old}, got {new}"
        )
    for track, meta in itertools.product(record.meta.tracks, chain):
        theirs = meta.track(track.name)
        if theirs is not None and _kind(theirs) != _kind(track):
            raise RecordError(
                f"parent {shorten(key)} has track {track.name!r} as (dtype, shape, ragged)"
                f" {_kind(theirs)}, got {_kind(track)}"
            )


def _kind(track: TrackMeta) -> tuple[str, tuple[int, ...], bool]:
    return track.dtype, track.shape, track.values is not None
