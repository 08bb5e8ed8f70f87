"""The blocking client: one object for everything a trainer asks of a served graph.

It works in a driver, a task or an actor. Every call ends within a timeout, and every error is one
of `serve_app.errors`. `serve_app.client.awaited` has the same, awaited.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from serve_app.client.keys import Key
from serve_app.client.reading import Reader
from serve_app.client.requests import which
from serve_app.client.rollouts import RolloutCalls
from serve_app.client.served import Handles, ServedGraph
from serve_app.continuing import put_continued
from serve_app.records import Record, Rows, Track, make_record
from serve_app.store.access.archive import restore, save
from serve_app.store.snapshot import Progress, SnapshotReport
from serve_app.types import (
    BatchSpec,
    BatchTrack,
    ExpertBatch,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    ModelShape,
    OnDivergence,
    OnMissing,
    OutputDtype,
    Pad,
    RankSlice,
    RoutedSequence,
    SleepLevel,
    StoreStats,
    UpdateMode,
    WeightsResult,
    Where,
)
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.registry import Payload

if TYPE_CHECKING:
    import ray
    import torch

    State = Mapping[str, torch.Tensor | npt.NDArray[Any]] | ray.ObjectRef[Any]


class RoutedExpertsClient:
    """Blocking client of one application.

    ``timeout_s`` bounds every call but generation, which has ``generate_timeout_s``; who waited so
    long takes 2 s more at most to tell the engines, and a batch up to 60 s to fetch what is there.
    ``handles`` is for Serve's local testing mode, where no application can be looked up.
    """

    def __init__(
        self,
        app: str,
        *,
        timeout_s: float = 60.0,
        generate_timeout_s: float = 600.0,
        handles: Handles | None = None,
    ) -> None:
        self._graph = ServedGraph(app, handles, timeout_s)
        self._rollouts = RolloutCalls(self._graph, generate_timeout_s)
        self._reader = Reader(self._graph)
        self._prefetcher: ThreadPoolExecutor | None = None

    def generate(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerateResult:
        """Sample one rollout.

        Raises `InvalidRequest`, `EngineOverloaded`, or `EngineUnavailable` when no replica
        answered in time or the one that sampled died; never retries.
        """
        return self._rollouts.generate(request, timeout_s)

    def generate_batch(
        self, requests: Sequence[GenerateRequest], *, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """Sample many rollouts at once; a failed one has finish reason ``error`` and says why."""
        return self._rollouts.generate_batch(requests, timeout_s)

    def generate_group(
        self, request: GenerateRequest, n: int, *, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """Sample ``n`` rollouts of one prompt on one replica, as ``request.member(i)`` each.

        The prompt is processed once, and its rows are stored once. Raises as `generate` does.
        """
        return self._rollouts.generate_group(request, n, timeout_s)

    def stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> Iterator[GenerateChunk]:
        """Sample one rollout and yield tokens as they come; closing the iterator aborts it."""
        yield from self._rollouts.stream(request, timeout_s)

    def abort(self, request_id: str | None = None, *, all: bool = False) -> int:
        """Abort one rollout, or all on every replica; return how many were under way."""
        return sum(self._graph.broadcast("abort", which(request_id, all)))

    def update_weights(
        self, state: "State", *, version: int, mode: UpdateMode = "abort"
    ) -> list[WeightsResult]:
        """Serve other weights on every replica, now and later; return a result per replica.

        ``state`` has exactly the names and shapes of the model's ``state_dict()``, or is a
        reference to one. ``abort`` ends running rollouts, ``drain`` lets them finish first.
        Raises `WeightsMismatch` if they do not fit, and then nothing changed.
        """
        return self._graph.update_weights(state, version, mode)

    def sleep(self, level: SleepLevel = 1) -> None:
        """Abort what runs and free the weights' device memory, on every replica.

        Level 2 forgets the weights. Until `wake`, requests end with `EngineAsleep`.
        """
        if level not in (1, 2):
            raise ValueError(f"expected sleep level 1 or 2, got {level!r}")
        self._graph.broadcast("sleep", level)

    def wake(self) -> None:
        """Serve again on every replica; forgotten weights are the newest of `update_weights`."""
        self._graph.broadcast("wake")

    def put(
        self,
        ids: npt.ArrayLike,
        *,
        num_experts: int,
        start: int = 0,
        moe_layers: Sequence[int] | None = None,
        weight_version: int = 0,
        tokens: Sequence[int] | None = None,
        valid: Rows | None = None,
        tracks: Mapping[str, Track | npt.NDArray[Any]] | None = None,
        parent: str | None = None,
        on_divergence: OnDivergence = "raise",
        tag: str | None = None,
        lease_s: float | None = None,
    ) -> Key:
        """Store routes ``[rows, layers, top_k]`` of an engine outside the graph; return the key.

        With ``parent``, the key of an earlier part, the new key reads as the whole sequence,
        and rows that the parent has are not stored again if it lives on this node. Where tokens
        part from the parent's, `PrefixMismatch` says at which position; with
        ``on_divergence="prefix"`` only the rows before are taken over, and the key's
        ``continued_rows`` says how many. See `serve_app.records.make_record` for the other
        arguments and what is refused.
        """
        record = make_record(
            ids,
            num_experts=num_experts,
            start=start,
            moe_layers=moe_layers,
            weight_version=weight_version,
            tokens=tokens,
            valid=valid,
            tracks=tracks,
        )
        store = self._graph.store
        if parent is None:
            return Key(store.put(record, tag=tag, lease_s=lease_s))
        put = put_continued(store, record, parent, on_divergence, tag=tag, lease_s=lease_s)
        return Key(put.key, put.rows)

    def get(self, key: str) -> Record:
        """Return a key's whole sequence; ``ids`` is read-only and, where possible, zero-copy."""
        return self._reader.get(key)

    def decode(self, payload: Payload, expected: Expected, *, allow_pickle: bool = False) -> Record:
        """Return the routes ``[rows, layers, top_k]`` that an engine's answer carries.

        The seed's contract: a ``str`` that is a key goes through the store, a list or any other
        payload is decoded here, see `serve_app.wire.registry` for the formats. Either way the
        record is of the ``expected`` model, `RecordError` otherwise; for a key also what `get`
        raises. An array put through ``shared_store`` becomes a record here. Nothing is unpickled
        but with ``allow_pickle``.
        """
        return self._reader.decode(payload, expected, allow_pickle)

    def materialize(
        self,
        sequences: Sequence[RoutedSequence],
        *,
        layout: Literal["packed", "padded"] = "packed",
        dtype: OutputDtype | None = None,
        rank: RankSlice | None = None,
        on_missing: OnMissing = "raise",
        pad: Pad = "mask",
        pad_seed: int = 0,
        tracks: Sequence[BatchTrack] = (),
        model: ModelShape | None = None,
        where: Where = "auto",
        out: "torch.Tensor | None" = None,
        pin: bool = False,
    ) -> ExpertBatch:
        """Turn keys into one tensor ``[tokens, layers, top_k]`` and its validity.

        ``rank`` cuts one trainer rank's rows and layers out; see `serve_app.types.RankSlice`, and
        `BatchSpec` for ``layout`` and ``pad``. ``dtype=None`` keeps the stored width. ``out``, a
        CPU tensor of the right shape and dtype, is filled instead of a new one; ``pin`` makes the
        new one page-locked where CUDA is. ``tracks=["tokens"]`` brings ``batch.tokens`` along.
        ``model`` says the shape of a batch of which nothing is left; by default the graph's engine
        is asked.
        ``where="local"`` assembles in this process straight from shared memory, ``"decoder"`` in
        decoder replicas next to the bytes, ``"auto"`` locally if all bytes are on this node. See
        `serve_app.materialize.materialize` for the errors.
        """
        spec = BatchSpec(
            dtype, on_missing, layout, rank or RankSlice(), pad, pad_seed, tuple(tracks), model
        )
        return self._reader.assemble(sequences, spec, where, out, pin)

    def prefetch(self, sequences: Sequence[RoutedSequence], **how: Any) -> "Future[ExpertBatch]":
        """Start `materialize` in the background; ``.result()`` gives its batch."""
        if self._prefetcher is None:
            self._prefetcher = ThreadPoolExecutor(1, "r3serve-prefetch")
        return self._prefetcher.submit(self.materialize, sequences, **how)

    def micro_batches(
        self, groups: Iterable[Sequence[RoutedSequence]], **how: Any
    ) -> Iterator[ExpertBatch]:
        """Yield `materialize` of each group, while the next one is already on its way."""
        coming: Future[ExpertBatch] | None = None
        try:
            for group in groups:
                last, coming = coming, self.prefetch(group, **how)
                if last is not None:
                    yield last.result()
            if coming is not None:
                yield coming.result()
        finally:
            if coming is not None:
                coming.cancel()

    def tag(self, keys: Sequence[str], tag: str) -> int:
        """Move keys under another tag; return how many."""
        return self._graph.store.retag(keys, tag)

    def renew(self, keys: Sequence[str] = (), *, tag: str | None = None, lease_s: float) -> int:
        """Let leases end ``lease_s`` seconds from now; return how many."""
        return self._graph.store.renew(keys, tag=tag, lease_s=lease_s)

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
        return self._graph.store.release(keys, tag=tag, weight_version_below=weight_version_below)

    def stats(self) -> StoreStats:
        """Return what the store holds now and what happened so far."""
        return self._graph.store.stats()

    def snapshot(
        self, path: str | Path, *, tag: str | None = None, progress: Progress | None = None
    ) -> SnapshotReport:
        """Save live records, or a tag's, as the new directory ``path`` (mode 0700, atomic).

        This process reads the records and writes the files. ``progress`` is called with the
        records done and in all. Raises `SnapshotError`, and then nothing appears.
        """
        return save(self._graph.shards, Path(path), tag, progress)

    def restore(self, path: str | Path, *, progress: Progress | None = None) -> SnapshotReport:
        """Bring a snapshot's keys back, on this node; altered files are refused by name."""
        return restore(self._graph.shards, Path(path), progress)
