"""The expert store in this process, for Serve's local testing mode and for tests without Ray."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.config import StoreArgs
from serve_app.errors import KeyUnreadable, RoutesLost, StoreFull, without_frames
from serve_app.records import ALL_TRACKS, Ids, Record, RecordMeta, Tracks, as_read
from serve_app.store.base import Meanwhile, Segments, TrackPart, Unreadable
from serve_app.store.keys import Key, verify
from serve_app.store.owner.ledger import Ledger
from serve_app.types import ShardStats, StoreStats

_SHARD = "0000000000"
_DEFAULT_BUDGET = 1 << 30


@dataclass(frozen=True, slots=True)
class _Kept:
    """A record's columns."""

    ids: Ids
    buffers: dict[str, npt.NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + sum(buffer.nbytes for buffer in self.buffers.values())

    def chosen(self, meta: RecordMeta, names: Sequence[str]) -> Tracks:
        everything = tuple(names) == ALL_TRACKS
        wanted = [track for track in meta.tracks if everything or track.name in names]
        return {each.name: each.over(self.buffers[each.name], meta.rows) for each in wanted}


def _own(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copied = array.copy()
    copied.flags.writeable = False
    return copied


class MemoryStore:
    """`RecordStore` over a dict. Thread-safe; leases are swept whenever it is used."""

    def __init__(
        self, app: str, args: StoreArgs, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._args = args
        self._budget = args.byte_budget or _DEFAULT_BUDGET
        self._clock = clock
        self._ledger: Ledger[_Kept] = Ledger()
        self._changed = threading.Condition()
        self._used = 0
        self._counts = dict.fromkeys(("puts", "gets", "full", "waiting", "unrouted"), 0)

    def put(
        self,
        record: Record,
        *,
        tag: str | None = None,
        lease_s: float | None = None,
        parent: str | None = None,
        parent_rows: int | None = None,
    ) -> str:
        """See `RecordStore`."""
        record = as_read(record)
        need = record.meta.nbytes
        with self._changed:
            self._sweep()
            self._wait_for_room(need)
            seq = self._ledger.add(
                record.meta,
                _Kept(_own(record.ids), {n: _own(t.buffer()) for n, t in record.tracks.items()}),
                now=self._clock(),
                lease_s=lease_s or self._args.lease_s,
                tag=tag,
                parent=None if parent is None else self._seq(parent),
                parent_rows=parent_rows,
            )
            self._used += need
            self._counts["puts"] += 1
            self._counts["unrouted"] += record.meta.unrouted
            return Key(self._app, _SHARD, 0, seq).sign(b"memory")

    async def aput(self, record: Record, **how: Any) -> str:
        """See `RecordStore`; blocks only where the budget is exhausted."""
        return self.put(record, **how)

    def fetch(
        self,
        keys: Sequence[str],
        meanwhile: Meanwhile | None = None,
        tracks: Sequence[str] = (),
    ) -> list[Segments | Unreadable]:
        """See `RecordStore`. Nobody is waited for, so ``meanwhile`` is left to the caller."""
        answers: list[Segments | Unreadable] = []
        with self._changed:
            self._sweep()
            for text in keys:
                try:
                    chain = self._ledger.read(self._seq(text), self._clock())
                except KeyUnreadable as why:
                    answers.append(without_frames(why))
                    continue
                self._counts["gets"] += 1
                answers.append(
                    [
                        Record(meta, kept.ids, kept.chosen(meta, tracks)).first(rows)
                        for meta, kept, rows in chain
                    ]
                )
        return answers

    def fetch_track(self, key: str, name: str) -> list[TrackPart] | Unreadable:
        """See `RecordStore`."""
        (found,) = self.fetch([key], tracks=[name])
        if not isinstance(found, list):
            return found
        return [(record.meta, record.tracks.get(name)) for record in found]

    def describe(self, keys: Sequence[str]) -> list[list[RecordMeta] | Unreadable]:
        """See `RecordStore`."""
        answers: list[list[RecordMeta] | Unreadable] = []
        with self._changed:
            self._sweep()
            for text in keys:
                try:
                    answers.append(self._ledger.describe(self._seq(text)))
                except KeyUnreadable as why:
                    answers.append(without_frames(why))
        return answers

    async def adescribe(self, key: str) -> list[RecordMeta] | Unreadable:
        """See `RecordStore`."""
        return self.describe([key])[0]

    def is_local(self, key: str) -> bool:
        """See `RecordStore`: everything is here."""
        verify(key, self._app, b"memory")
        return True

    def release(
        self,
        keys: Sequence[str] = (),
        *,
        tag: str | None = None,
        weight_version_below: int | None = None,
    ) -> int:
        """See `RecordStore`."""
        with self._changed:
            self._sweep()
            chosen = self._chosen(keys, tag)
            first = None if weight_version_below is None else 0
            while first is not None and weight_version_below is not None:
                older, first = self._ledger.older(weight_version_below, first)
                chosen += older
            ended = sum(self._ledger.release(seq) for seq in chosen)
            self._give_back()
            return ended

    def renew(self, keys: Sequence[str] = (), *, tag: str | None = None, lease_s: float) -> int:
        """See `RecordStore`."""
        with self._changed:
            self._sweep()
            chosen = self._chosen(keys, tag)
            for seq in chosen:
                self._ledger.renew(seq, self._clock(), lease_s)
            return len(chosen)

    def retag(self, keys: Sequence[str], tag: str) -> int:
        """See `RecordStore`."""
        with self._changed:
            self._sweep()
            chosen = self._chosen(keys, None)
            for seq in chosen:
                self._ledger.tag(seq, tag)
            return len(chosen)

    def stats(self) -> StoreStats:
        """See `RecordStore`."""
        with self._changed:
            self._sweep()
            shard = ShardStats(
                shard=_SHARD,
                live_keys=self._ledger.live,
                live_bytes=self._used,
                byte_budget=self._budget,
                waiting_puts=self._counts["waiting"],
                puts=self._counts["puts"],
                gets=self._counts["gets"],
                released=self._ledger.released,
                expired=self._ledger.expired,
                full=self._counts["full"],
                unrouted_rows=self._counts["unrouted"],
            )
        return StoreStats((shard,))

    def _wait_for_room(self, need: int) -> None:
        if need > self._budget:
            self._counts["full"] += 1
            raise StoreFull(f"{need} bytes can never fit a byte budget of {self._budget}")
        self._counts["waiting"] += 1
        timeout_s = self._args.put_timeout_s
        fits = self._changed.wait_for(lambda: self._used + need <= self._budget, timeout_s)
        self._counts["waiting"] -= 1
        if not fits:
            self._counts["full"] += 1
            raise StoreFull(
                f"no room for {need} bytes within {timeout_s} s:"
                f" {self._used} of {self._budget} bytes are held"
            )

    def _chosen(self, keys: Sequence[str], tag: str | None) -> list[int]:
        return [self._seq(key) for key in keys] + ([] if tag is None else self._ledger.tagged(tag))

    def _seq(self, text: str) -> int:
        key = verify(text, self._app, b"memory")
        if key.epoch:
            raise RoutesLost("the process that held the bytes is gone")
        return key.seq

    def _sweep(self) -> None:
        for _ in self._ledger.expire(self._clock()):
            pass
        self._give_back()

    def _give_back(self) -> None:
        if freed := sum(kept.nbytes for kept in self._ledger.take_dropped()):
            self._used -= freed
            self._changed.notify_all()


_shared: dict[str, MemoryStore] = {}


def shared(app: str, args: StoreArgs | None = None) -> MemoryStore:
    """Return this process's one store of an application, made at first use."""
    if app not in _shared:
        _shared[app] = MemoryStore(app, args or StoreArgs(backend="memory"))
    return _shared[app]
