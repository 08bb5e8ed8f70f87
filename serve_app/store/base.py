"""What every expert store does; one contract suite runs on all of them."""

from collections.abc import Callable, Sequence
from typing import Protocol

from serve_app.errors import KeyUnreadable, StoreUnavailable
from serve_app.records import Record, RecordMeta
from serve_app.types import StoreStats

Segments = list[Record]
"""A key's whole sequence: its ancestors' records and its own, oldest first."""

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
    ) -> str:
        """Store a record and return its key once the store owns the bytes.

        Raises `StoreFull`, `StoreUnavailable`, or why ``parent`` cannot be read.
        """
        ...

    async def aput(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
    ) -> str:
        """Do as `put`, without blocking the running event loop."""
        ...

    def fetch(
        self, keys: Sequence[str], meanwhile: Meanwhile | None = None
    ) -> list[Segments | Unreadable]:
        """Return each key's segments, or why it has none. Reading renews and never destroys.

        ``meanwhile`` is run once at most; what it raises ends the read.
        """
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

    def release(self, keys: Sequence[str] = (), *, tag: str | None = None) -> int:
        """End keys, or all under a tag; return how many were live. Idempotent."""
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
