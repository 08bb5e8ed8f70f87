"""Every key that a chaos run was handed, and what the store may answer for it.

Times are the driver's monotonic clock. An answer is judged by what was true at some moment
between the call's begin and its end.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from benchmarks.harness.routes import random_routes
from serve_app.errors import (
    KeyExpired,
    KeyReleased,
    KeyUnreadable,
    RoutesLost,
    StoreFull,
    StoreUnavailable,
    UnknownKey,
)
from serve_app.records import Ids

LAYERS, TOP_K, NUM_EXPERTS = 12, 8, 128
TROUBLE_S = 30.0
"""How long after a fault calls may end with `StoreUnavailable`."""
HANG_S = 45.0


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one record; the seed says which."""

    seed: int
    rows: int
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.rows

    def ids(self) -> Ids:
        return random_routes((self.rows, LAYERS, TOP_K), NUM_EXPERTS, self.seed)


@dataclass(slots=True)
class Entry:
    """One key. Its lease ends at ``safe_until`` or later."""

    key: str
    parts: tuple[Part, ...]
    shard: str
    tag: str
    begun: float
    lease_s: float
    safe_until: float
    release_begun: float | None = None
    release_done: float | None = None

    @property
    def rows(self) -> int:
        return self.parts[-1].stop

    def ids(self) -> Ids:
        return np.concatenate([part.ids() for part in self.parts])


@dataclass(slots=True)
class Book:
    """Thread-safe: several threads write down and judge."""

    entries: dict[str, Entry] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    _kills: list[tuple[str, float, float]] = field(default_factory=list)
    _troubles: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, entry: Entry) -> None:
        with self._lock:
            self.entries[entry.key] = entry

    def live(self) -> list[Entry]:
        """Return the entries that nobody has begun to release."""
        with self._lock:
            return [entry for entry in self.entries.values() if entry.release_begun is None]

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def violate(self, what: str) -> None:
        with self._lock:
            self.violations.append(what)

    def trouble(self, now: float) -> None:
        """Note that something was killed."""
        with self._lock:
            self._troubles.append(now)

    def kill(self, shard: str, begun: float, done: float) -> None:
        """Note that a shard's process or node is being killed, or was at ``done``."""
        with self._lock:
            self._kills = [kill for kill in self._kills if kill[:2] != (shard, begun)]
            self._kills.append((shard, begun, done))

    def took(self, what: str, begun: float, ended: float) -> None:
        with self._lock:
            self.longest_s = max(self.longest_s, ended - begun)
        if ended - begun > HANG_S:
            self.violate(f"{what} took {ended - begun:.1f} s")

    def kept(self, entry: Entry, begun: float, lease_s: float) -> None:
        """Note that a call which renews the lease succeeded."""
        with self._lock:
            entry.lease_s = lease_s
            entry.safe_until = max(entry.safe_until, begun + lease_s)

    def check_ids(self, entry: Entry, ids: Ids, begun: float) -> None:
        """Judge bytes that the store gave for a key."""
        if entry.release_done is not None and entry.release_done < begun:
            self.violate(f"{entry.key} read although it was released")
        elif not np.array_equal(ids, entry.ids()):
            self.violate(f"{entry.key} gave wrong bytes")
        else:
            self.count("right")

    def check_error(
        self, entry: Entry | None, error: Exception, begun: float, ended: float
    ) -> None:
        """Judge an error that a call about a key, or about none, ended with."""
        self.count(type(error).__name__)
        if not self.may_be(entry, error, begun, ended):
            about = entry.key if entry else "a call"
            self.violate(f"{about}: {type(error).__name__}: {str(error)[:300]}")

    def may_be(self, entry: Entry | None, error: Exception, begun: float, ended: float) -> bool:
        """Whether the table of promises allows this error."""
        if isinstance(error, StoreUnavailable):
            with self._lock:
                return any(at <= ended and begun <= at + TROUBLE_S for at in self._troubles)
        if isinstance(error, StoreFull):
            return True
        if entry is None or not isinstance(error, KeyUnreadable) or isinstance(error, UnknownKey):
            return False
        if isinstance(error, KeyReleased):
            return entry.release_begun is not None and entry.release_begun <= ended
        if isinstance(error, KeyExpired):
            return ended >= entry.safe_until
        assert isinstance(error, RoutesLost)
        with self._lock:
            return any(
                shard == entry.shard and at <= ended and entry.begun <= gone
                for shard, at, gone in self._kills
            )
