"""What a shard knows of its records: chains, tags, leases, tombstones. No Ray, no waiting.

A record is live until it is released or its lease ends; then one byte remembers which. Its
payload is kept as long as a child needs it, and handed back to the caller when nothing does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

from serve_app.errors import KeyExpired, KeyReleased, UnknownKey
from serve_app.records import RecordMeta
from serve_app.store.owner.leases import Leases

TOMBSTONES = 1 << 22
_TRIM_AT_LEAST = 1 << 16
_LOOK_AT = 20_000

P = TypeVar("P")


class _State(IntEnum):
    LIVE = 1
    RELEASED = 2
    EXPIRED = 3


_STATES: tuple[_State | None, ...] = (None, *_State)
"""By value: an enum's own look-up would cost a read a fifth of its time."""


@dataclass(slots=True)
class _Entry(Generic[P]):
    meta: RecordMeta
    payload: P
    lease_s: float
    tag: str | None
    parent: int | None
    parent_rows: int | None
    born: float
    children: int = 0


Link = tuple[RecordMeta, P, int]
"""A record of a chain, its payload, and how many of its rows the chain has. A plain tuple: named
ones take several times as long to make, and a read makes thousands."""


class Held(NamedTuple, Generic[P]):
    """A record that is held, live or because a live one needs it."""

    meta: RecordMeta
    payload: P
    lease_s: float
    tag: str | None
    parent: int | None
    parent_rows: int | None


class Ledger(Generic[P]):
    """Records by sequence number, each with an opaque payload.

    Payloads that nothing needs any more collect until `take_dropped`; whoever runs the ledger
    gives their memory back.
    """

    def __init__(self) -> None:
        self.released = 0
        self.expired = 0
        self.live = 0
        self._next = 0
        self._entries: dict[int, _Entry[P]] = {}
        self._states = bytearray()
        self._first_state = 0
        self._leases = Leases()
        self._tags: dict[str, dict[int, None]] = {}
        self._dropped: list[P] = []

    def add(
        self,
        meta: RecordMeta,
        payload: P,
        *,
        now: float,
        lease_s: float,
        tag: str | None = None,
        parent: int | None = None,
        parent_rows: int | None = None,
    ) -> int:
        """Keep a record until ``now + lease_s``; return its sequence number.

        ``parent`` must be readable; its rows, up to position ``parent_rows``, become the beginning
        of this record's sequence.
        """
        if parent is not None:
            self._live(parent).children += 1
        seq, self._next = self._next, self._next + 1
        self._entries[seq] = _Entry(meta, payload, lease_s, None, parent, parent_rows, now)
        self._states.append(_State.LIVE)
        self._leases.add(seq, now + lease_s)
        self.live += 1
        if tag is not None:
            self.tag(seq, tag)
        return seq

    def read(self, seq: int, now: float) -> list[Link[P]]:
        """Return the record's chain, oldest ancestor first, and renew its lease."""
        entry = self._live(seq)
        self._leases.renew(seq, now + entry.lease_s)
        return self._chain(entry)

    def describe(self, seq: int) -> list[RecordMeta]:
        """Return the headers of the record's chain, oldest ancestor first; renews nothing."""
        return [
            meta if rows == meta.rows else meta.first(rows)
            for meta, _, rows in self._chain(self._live(seq))
        ]

    def _chain(self, entry: _Entry[P]) -> list[Link[P]]:
        """Walk up to the oldest ancestor; each link may take less of what is above it."""
        chain: list[Link[P]] = [(entry.meta, entry.payload, entry.meta.rows)]
        if entry.parent is None:
            return chain
        limit: int | None = None
        while entry.parent is not None:
            if entry.parent_rows is not None:
                limit = entry.parent_rows if limit is None else min(limit, entry.parent_rows)
            entry = self._entries[entry.parent]
            meta = entry.meta
            rows = meta.rows if limit is None else min(meta.rows, limit - meta.start)
            if rows > 0:
                chain.append((meta, entry.payload, rows))
        chain.reverse()
        return chain

    def oldest_s(self, now: float) -> float:
        """Return the age of the oldest record that is held, 0 if there is none."""
        oldest = next(iter(self._entries.values()), None)
        return now - oldest.born if oldest else 0.0

    def held(self, first: int, limit: int) -> tuple[list[int], int | None]:
        """Return some records held from ``first`` on, and where to go on (None at the end).

        Looks at a bounded stretch of numbers, so a caller with many pauses never blocks long.
        """
        found: list[int] = []
        for seq in range(first, min(first + _LOOK_AT, self._next)):
            if seq in self._entries:
                found.append(seq)
                if len(found) == limit:
                    return found, seq + 1
        reached = first + _LOOK_AT
        return found, reached if reached < self._next else None

    def older(self, version: int, first: int) -> tuple[list[int], int | None]:
        """Return live records of weights before ``version`` from number ``first`` on.

        Not those whose weights nobody knows. Looks at a bounded stretch, as `held` does, and says
        where to go on.
        """
        first = max(first, next(iter(self._entries), self._next))
        stop = min(first + _LOOK_AT, self._next)
        found = [
            seq
            for seq in range(first, stop)
            if (entry := self._entries.get(seq)) is not None
            and entry.meta.weight_version < version
            and entry.meta.raw is None
            and self.is_live(seq)
        ]
        return found, stop if stop < self._next else None

    def family(self, tag: str) -> list[int]:
        """Return a tag's live records and their ancestors; parents come before children."""
        wanted: set[int] = set()
        for seq in self._tags.get(tag, ()):
            at: int | None = seq
            while at is not None and at not in wanted:
                wanted.add(at)
                at = self._entries[at].parent
        return sorted(wanted)

    def is_live(self, seq: int) -> bool:
        """Whether the record reads."""
        return self._state(seq) is _State.LIVE

    def entry(self, seq: int) -> "Held[P] | None":
        """Return a held record and what is known of it; None if it is gone."""
        if (entry := self._entries.get(seq)) is None:
            return None
        return Held(
            entry.meta, entry.payload, entry.lease_s, entry.tag, entry.parent, entry.parent_rows
        )

    def renew(self, seq: int, now: float, lease_s: float) -> None:
        """Let the lease end at ``now + lease_s``, and last as long after each read."""
        self._live(seq).lease_s = lease_s
        self._leases.renew(seq, now + lease_s)

    def tag(self, seq: int, tag: str) -> None:
        """Put the record under ``tag``, and under no other."""
        entry = self._live(seq)
        self._untag(seq, entry)
        entry.tag = tag
        self._tags.setdefault(tag, {})[seq] = None

    def tagged(self, tag: str) -> list[int]:
        """Return the live records under ``tag``."""
        return list(self._tags.get(tag, ()))

    def release(self, seq: int) -> bool:
        """End a record for good; False if it had ended before (idempotent)."""
        if self._state(seq) is not _State.LIVE:
            return False
        self._leases.end(seq)
        self._end(seq, _State.RELEASED)
        self.released += 1
        return True

    def expire(self, now: float) -> Iterator[int]:
        """End the records whose leases are over, one a step, so that the caller may pause."""
        for seq in self._leases.sweep(now):
            self._end(seq, _State.EXPIRED)
            self.expired += 1
            yield seq
        self._trim()

    def take_dropped(self) -> list[P]:
        """Hand over the payloads that nothing needs any more."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _end(self, seq: int, state: _State) -> None:
        self._states[seq - self._first_state] = state
        self.live -= 1
        self._untag(seq, self._entries[seq])
        self._drop_unneeded(seq)

    def _drop_unneeded(self, seq: int) -> None:
        at: int | None = seq
        while at is not None:
            entry = self._entries[at]
            if entry.children or self._states[at - self._first_state] == _State.LIVE:
                return
            del self._entries[at]
            self._dropped.append(entry.payload)
            at = entry.parent
            if at is not None:
                self._entries[at].children -= 1

    def _untag(self, seq: int, entry: _Entry[P]) -> None:
        if entry.tag is None:
            return
        under = self._tags[entry.tag]
        del under[seq]
        if not under:
            del self._tags[entry.tag]
        entry.tag = None

    def _state(self, seq: int) -> _State:
        if not 0 <= seq < self._next:
            raise UnknownKey(f"record {seq} was never put here")
        if seq < self._first_state:
            return _State.RELEASED
        state = _STATES[self._states[seq - self._first_state]]
        assert state is not None
        return state

    def _live(self, seq: int) -> _Entry[P]:
        state = self._state(seq)
        if state is _State.RELEASED:
            raise KeyReleased("the key was released")
        if state is _State.EXPIRED:
            raise KeyExpired("the key's lease ended before it was read, renewed or released")
        return self._entries[seq]

    def _trim(self) -> None:
        """Bound the memory of ended records; the oldest of them then all read as released."""
        oldest = next(iter(self._entries), self._next)
        if oldest - self._leases.first >= _TRIM_AT_LEAST:
            self._leases.trim(oldest)
        surplus = min(oldest, self._next - TOMBSTONES) - self._first_state
        if surplus >= _TRIM_AT_LEAST:
            del self._states[:surplus]
            self._first_state += surplus
