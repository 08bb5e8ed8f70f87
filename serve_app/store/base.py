"""What every expert store does; one contract suite runs on all of them."""

from collections.abc import Callable, Sequence
from typing import Protocol

from serve_app.errors import KeyUnreadable, StoreUnavailable
from serve_app.records import Record, RecordMeta, Track
from serve_app.types import StoreStats

Segments = list[Record]
"""A key's whole sequence: its ancestors' records and its own, oldest first."""

TrackPart = tuple[RecordMeta, Track | None]
"""A segment's header and its track, None where it has none of that name."""

Unreadable = KeyUnreadable | StoreUnavailable
Meanwhile = Callable[[], object]
"""The caller's own work, done while the shards do theirs."""


class RecordStore(Protocol):
    """Keeps records under keys. Methods block, but for `aput`; each ends within a timeout."""

    def put(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
        parent_rows: int | None = None,
    ) -> str:
        """Store a record and return its key once the store owns the bytes.

        With ``parent`` the key reads as the parent's sequence, up to position ``parent_rows`` where
        that is given, and then the record's. Raises `StoreFull`, `StoreUnavailable`, or why
        ``parent`` cannot be read.
        """
        ...

    async def aput(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
        parent_rows: int | None = None,
    ) -> str:
        """Do as `put`, without blocking the running event loop."""
        ...

    def fetch(
        self,
        keys: Sequence[str],
        meanwhile: Meanwhile | None = None,
        tracks: Sequence[str] = (),
    ) -> list[Segments | Unreadable]:
        """Return each key's segments, or why it has none. Reading renews and never destroys.

        Records come with those of the ``tracks`` that they have (`ALL_TRACKS`: with all of theirs);
        the others do not move.
        ``meanwhile`` is run once at most; what it raises ends the read.
        """
        ...

    def fetch_track(self, key: str, name: str) -> "list[TrackPart] | Unreadable":
        """Return one track of each of the key's segments, and no routes."""
        ...

    def describe(self, keys: Sequence[str]) -> list[list[RecordMeta] | Unreadable]:
        """Return the headers of each key's segments; fetches no bytes and renews nothing."""
        ...

    async def adescribe(self, key: str) -> list[RecordMeta] | Unreadable:
        """Do as `describe` for one key, without blocking the running event loop."""
        ...

    def is_local(self, key: str) -> bool:
        """Whether the key's bytes lie where this process would put a record."""
        ...

    def release(
        self,
        keys: Sequence[str] = (),
        *,
        tag: str | None = None,
        weight_version_below: int | None = None,
    ) -> int:
        """End keys, all under a tag, or all of earlier weights; return how many were live.

        A key's weights are those of its newest part, 0 where nobody said. Idempotent.
        """
        ...

    def renew(self, keys: Sequence[str] = (), *, tag: str | None = None, lease_s: float) -> int:
        """Let leases end ``lease_s`` from now; return how many were renewed."""
        ...

    def retag(self, keys: Sequence[str], tag: str) -> int:
        """Move live keys under another tag; return how many."""
        ...

    def stats(self) -> StoreStats:
        """Return what is held now and what happened so far."""
        ...
