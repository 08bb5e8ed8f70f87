"""Snapshot and restore of a running store: the shards' records to files, and back."""

from pathlib import Path

from serve_app.records import Record
from serve_app.store.access.client import ShardStore
from serve_app.store.snapshot import (
    PAGE_RECORDS,
    Entry,
    Progress,
    SavedPage,
    SnapshotReport,
    SnapshotWriter,
    restore_pages,
)


def save(
    store: ShardStore, path: Path, tag: str | None = None, progress: Progress | None = None
) -> SnapshotReport:
    """Write all live records, or a tag's, into the new directory ``path``.

    Records that come or go meanwhile may or may not be in it. Raises `SnapshotError`, or
    `StoreUnavailable` when a shard does not answer; then nothing appears.
    """
    total = store.stats().live_keys
    writer = SnapshotWriter(path, store.app, store.secret)
    try:
        for entries, records in store.pages(tag):
            writer.write(entries, records)
            if progress:
                progress(writer.records, max(total, writer.records))
        return writer.commit()
    except BaseException:
        writer.discard()
        raise


def restore(store: ShardStore, path: Path, progress: Progress | None = None) -> SnapshotReport:
    """Put a snapshot's records onto this node; their old keys read again.

    A torn or altered file is refused, by name, and the others restored. Leases begin anew.
    """
    records, nbytes, refused, ancestors = 0, 0, list[str](), list[str]()
    adopted: dict[bytes, dict[str, str]] = {}

    def adopt() -> None:
        while adopted:
            store.adopt(*adopted.popitem())

    def put(page: SavedPage, entry: Entry, record: Record, parent: str | None) -> str:
        new_key = store.put(
            record,
            tag=entry.tag,
            lease_s=entry.lease_s,
            parent=parent,
            parent_rows=entry.parent_rows,
        )
        of_secret = adopted.setdefault(page.secret, {})
        of_secret[entry.key] = new_key
        if len(of_secret) >= PAGE_RECORDS:
            adopt()
        return new_key

    for outcome in restore_pages(path, store.app, put):
        if isinstance(outcome, str):
            refused.append(outcome)
            continue
        entry, new_key = outcome
        records, nbytes = records + 1, nbytes + entry.meta.nbytes
        if not entry.live:
            ancestors.append(new_key)
        if progress:
            progress(records, records)
    adopt()
    store.release(ancestors)
    return SnapshotReport(records, nbytes, tuple(refused))
