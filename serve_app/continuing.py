"""Records that continue others: where two sequences part, and putting new rows only.

A key reads as its whole sequence, and the earliest capture of a row wins. So a child of a parent
on the same shard stores only the rows that its parent lacks; elsewhere the parent's are copied
beside it, each part with its own version. Tokens are compared wherever both sides have them: rows
that were captured on other tokens are another sequence's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serve_app.errors import PrefixMismatch, RecordError
from serve_app.records import (
    TOKENS,
    UNKNOWN,
    Record,
    RecordMeta,
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

    ``covered`` rows of it, from row 0 on, have no gap; ``unknown`` is the first position at which
    both have a row and one of them no token.
    """

    covered: int
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
    stop = first + len(tokens)
    return all(
        meta.token_hash is not None
        and first <= meta.start
        and meta.stop <= stop
        and meta.token_hash == hash_tokens(tokens[meta.start - first : meta.stop - first])
        for meta in chain
    )


def compare(
    store: RecordStore, key: str, chain: Sequence[RecordMeta], tokens: Tokens, first: int = 0
) -> Compared:
    """Compare a key's sequence with tokens, those from position ``first`` on.

    The key's own tokens are fetched only where hashes do not tell. Blocks. Raises why the key
    cannot be read.
    """
    rows = covered(chain)
    if same_by_hash(chain, tokens, first):
        return Compared(rows)
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
    return Compared(rows, min(partings, default=None), min(unknown, default=None))


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
    _check_model(record, chain[0], parent)
    rows = _rows_taken(store, record, parent, chain, on_divergence)
    whole = covered(chain)
    if not rows:
        return Continued(store.put(record, tag=tag, lease_s=lease_s), 0)
    new = new_part_of(record, rows)
    cut = rows if rows < whole else None
    if store.is_local(parent):
        key = store.put(new, tag=tag, lease_s=lease_s, parent=parent, parent_rows=cut)
        return Continued(key, rows)
    tracks = {track.name: None for meta in chain for track in meta.tracks}
    (segments,) = store.fetch([parent], tracks=list(tracks))
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
    """Return a chain's segments up to position ``stop``, each fit to be put anew."""
    if stop is None:
        return segments
    return [
        segment if segment.meta.stop <= stop else part_of(segment, segment.start, stop)
        for segment in segments
        if segment.start < stop
    ]


def _rows_taken(
    store: RecordStore,
    record: Record,
    parent: str,
    chain: Sequence[RecordMeta],
    on_divergence: OnDivergence,
) -> int:
    """Return how many of the parent's rows the record's sequence begins with."""
    tokens, what = record.tokens, f"parent {shorten(parent)}"
    if on_divergence == "raise":
        if tokens is None:
            return covered(chain)
        found = compare(store, parent, chain, tokens, record.start)
        found.check_same(what)
        return found.covered
    if tokens is None:
        raise RecordError(
            f"{what}: on_divergence='prefix' compares tokens, expected those of"
            f" {record.meta.rows} rows, got none"
        )
    return min(compare(store, parent, chain, tokens, record.start).common, record.meta.stop)


def _check_model(record: Record, parent: RecordMeta, key: str) -> None:
    new = (record.meta.layers, record.meta.top_k, record.num_experts, record.moe_layers)
    old = (parent.layers, parent.top_k, parent.num_experts, parent.moe_layers)
    if new != old:
        raise RecordError(
            f"parent {shorten(key)} has (layers, top_k, experts, MoE layers) {old}, got {new}"
        )
