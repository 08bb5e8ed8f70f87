"""Saving an application's live records, and bringing the same keys back in another cluster.

A snapshot is a directory, mode 0700, of safetensors files. Each holds some records of one shard,
ancestors before their children; its metadata lists their headers and keys as JSON, with a hash of
that JSON. A file is taken whole or refused by name. The secret that signed the keys is in the
files too: whoever reads a snapshot can read the keys.

The shards are asked for a page of records at a time, and the bytes come out of the object store
straight into the saving process, so nobody waits for a disk.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from serve_app.errors import RecordError, SnapshotError, StoreError
from serve_app.records import FORMAT_VERSION, Record, RecordMeta, TrackMeta
from serve_app.records.distinct import repeating_rows

FORMAT = "r3serve-snapshot-2"
FORMAT_BEFORE = "r3serve-snapshot-1"
"""Without tracks: of tokens it has a hash that nothing can be compared with, which is left out."""
PAGE_RECORDS = 64

Progress = Callable[[int, int], None]
"""Called with the records done so far and the records in all."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as it is saved. ``parent`` is the key of the record that it continues, up to
    position ``parent_rows`` where that is not None.

    ``live`` is False for an ancestor that was released but that a live record needs.
    """

    key: str
    parent: str | None
    tag: str | None
    lease_s: float
    live: bool
    meta: RecordMeta
    parent_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A shard's records from one sequence number on; ``next`` is None after the last.

    ``tracks`` are the names of all that they have.
    """

    entries: list[Entry]
    next: int | None
    tracks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """What was saved or restored; ``refused`` names each file or record that was not, and why."""

    records: int
    nbytes: int
    refused: tuple[str, ...] = ()


class SnapshotWriter:
    """Writes pages as files into a new directory that appears, whole, at `commit`."""

    def __init__(self, path: Path, app: str, secret: bytes) -> None:
        if path.exists():
            raise SnapshotError(f"{path} exists already; a snapshot never overwrites")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._app = app
        self._secret = secret
        # In the same directory, so that the rename is atomic; mkdtemp makes it mode 0700.
        self._partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        self._files = 0
        self.records = 0
        self.nbytes = 0

    def write(self, entries: list[Entry], records: list[Record]) -> None:
        """Save one page."""
        listed = json.dumps([_item(entry) for entry in entries])
        metadata = {
            "format": FORMAT,
            "app": self._app,
            "secret": self._secret.hex(),
            "records": listed,
            "hash": xxhash.xxh3_64_hexdigest(listed.encode()),
        }
        file = self._partial / f"part-{self._files:05d}.safetensors"
        columns = {
            name: array for i, record in enumerate(records) for name, array in _columns(i, record)
        }
        save_file(columns, file, metadata)
        _sync(file)
        self._files += 1
        self.records += len(entries)
        self.nbytes += sum(array.nbytes for array in columns.values())

    def commit(self) -> SnapshotReport:
        """Make the snapshot appear."""
        _sync(self._partial)
        self._partial.rename(self._path)
        _sync(self._path.parent)
        return SnapshotReport(self.records, self.nbytes)

    def discard(self) -> None:
        """Remove what was written."""
        for file in self._partial.iterdir():
            file.unlink()
        self._partial.rmdir()


@dataclass(frozen=True, slots=True)
class SavedPage:
    """One file's records, verified."""

    secret: bytes
    entries: list[Entry]
    records: list[Record]


def snapshot_files(path: Path) -> list[Path]:
    """Return a snapshot's files in the order they were written."""
    files = sorted(path.glob("part-*.safetensors"))
    if not files:
        raise SnapshotError(f"{path} is no snapshot: expected part-*.safetensors files in it")
    return files


def saved_app(file: Path) -> str:
    """Return the application whose records a file holds."""
    try:
        with safe_open(file, framework="numpy") as saved:
            return str((saved.metadata() or {})["app"])
    except (SafetensorError, OSError, KeyError) as error:
        raise SnapshotError(f"{file.name}: {error}") from None


def read_page(file: Path, app: str) -> SavedPage:
    """Read and verify a file; raise `SnapshotError` naming it if anything is not as written."""
    try:
        with safe_open(file, framework="numpy") as saved:
            metadata = saved.metadata() or {}
            _check_metadata(metadata, app)
            entries = [_entry(item) for item in json.loads(metadata["records"])]
            records = [_record(saved, i, entry.meta) for i, entry in enumerate(entries)]
        for record in records:
            record.meta.verify(record.ids, dict(record.tracks))
    except (SafetensorError, RecordError, OSError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{file.name}: {error}") from None
    if metadata["format"] == FORMAT_BEFORE:
        records = [_looked_at(record) for record in records]
        entries = [
            replace(entry, meta=record.meta) for entry, record in zip(entries, records, strict=True)
        ]
    return SavedPage(bytes.fromhex(metadata["secret"]), entries, records)


def _check_metadata(metadata: dict[str, str], app: str) -> None:
    if metadata.get("format") not in (FORMAT, FORMAT_BEFORE):
        raise ValueError(
            f"expected format {FORMAT} or {FORMAT_BEFORE}, got {metadata.get('format')}"
        )
    if metadata.get("app") != app:
        raise ValueError(f"expected records of application {app!r}, got {metadata.get('app')!r}")
    if xxhash.xxh3_64_hexdigest(metadata["records"].encode()) != metadata["hash"]:
        raise ValueError("the list of records was altered")


def _item(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "meta": entry.meta._asdict()}


def _entry(item: dict[str, Any]) -> Entry:
    meta = item.pop("meta")
    meta.pop("token_hash", None)  # of a snapshot of the format before
    # Once only how many there are was said.
    meta.setdefault("unrouted_rows", meta["invalid"][: meta.pop("unrouted", 0)])
    for field in ("moe_layers", "invalid", "unrouted_rows"):
        meta[field] = tuple(meta[field])
    tracks = tuple(
        TrackMeta(name, dtype, tuple(shape), values, seal)
        for name, dtype, shape, values, seal in meta.pop("tracks", ())
    )
    meta["format_version"] = FORMAT_VERSION
    return Entry(meta=RecordMeta(**meta, tracks=tracks), **item)


def _columns(number: int, record: Record) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield a record's columns by the names that they have in a file."""
    yield str(number), record.ids
    for name, track in record.tracks.items():
        yield f"{number}.{name}", track.buffer()


def _record(saved: Any, number: int, meta: RecordMeta) -> Record:
    tracks = {
        track.name: track.over(saved.get_tensor(f"{number}.{track.name}"), meta.rows)
        for track in meta.tracks
    }
    return Record(meta, saved.get_tensor(str(number)), tracks)


def _looked_at(record: Record) -> Record:
    """Mark the rows that nobody routed: who saved them did not look."""
    if record.meta.raw:
        return record
    unrouted = repeating_rows(record.ids, record.moe_layers) & record.valid
    invalid = tuple(np.flatnonzero(unrouted | ~record.valid).tolist())
    rows = tuple(np.flatnonzero(unrouted).tolist())
    meta = record.meta._replace(invalid=invalid, unrouted_rows=rows)
    return Record(meta, record.ids)


def _sync(path: Path) -> None:
    """Make a file or a directory's names survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore_pages(
    path: Path,
    app: str,
    put: "Callable[[SavedPage, Entry, Record, str | None], str]",
) -> Iterator[tuple[Entry, str] | str]:
    """Put every readable record back; yield (entry, new key) for each, or why not.

    ``put`` gets the new key of the record's parent. A child whose parent was refused is, too.
    """
    new_keys: dict[str, str] = {}
    for file in snapshot_files(path):
        try:
            page = read_page(file, app)
        except SnapshotError as error:
            yield str(error)
            continue
        for entry, record in zip(page.entries, page.records, strict=True):
            if entry.parent is not None and entry.parent not in new_keys:
                yield f"{file.name}: a record's beginning could not be restored"
                continue
            parent = None if entry.parent is None else new_keys[entry.parent]
            try:
                new_keys[entry.key] = put(page, entry, record, parent)
            except StoreError as error:
                yield f"{file.name}: {error}"
                continue
            yield entry, new_keys[entry.key]
