"""The decoder deployment: keys to tensors, next to the data; stateless."""

import asyncio
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.serve.handle import DeploymentHandle

from serve_app.assemble.destination import Allocate
from serve_app.assemble.ranks import Piece
from serve_app.assemble.sequence_table import SequenceTable
from serve_app.config import DecoderArgs, StoreArgs
from serve_app.deployments.context import connect_store
from serve_app.deployments.metrics import DecoderAnswer, DecoderMetrics
from serve_app.deployments.store import ExpertStore
from serve_app.deployments.underway import Underway
from serve_app.errors import R3Error, without_frames
from serve_app.materialize import materialize
from serve_app.observe.masked_rows import masked_rows
from serve_app.store.base import RecordStore
from serve_app.store.owner.directory import this_node
from serve_app.store.owner.object_store import default_budget
from serve_app.types import BatchSpec, PackedExperts, RoutedSequence

_KEPT_BYTES = 256 << 20


class ExpertDecoder:
    """One decoder replica. What it answers lives until the caller has read it; a retry redoes."""

    def __init__(
        self, args: DecoderArgs, store_args: StoreArgs, store: DeploymentHandle[ExpertStore]
    ) -> None:
        self._args = args
        self._store_args = store_args
        self._supervisor = store
        self._store: RecordStore | None = None
        self._workspace = Workspace()
        self._underway = Underway()
        self._metrics = DecoderMetrics()

    async def materialize(
        self,
        sequences: Sequence[RoutedSequence] | SequenceTable,
        spec: BatchSpec,
        pieces: Sequence[Piece] | None = None,
        near: str = "",
    ) -> "PackedExperts | list[ray.ObjectRef[PackedExperts]]":
        """Do as `serve_app.materialize.materialize`; answer by reference where there is Ray.

        By value, 100 MB would be written and read again on the way (131 ms instead of 80).
        ``near`` is for `serve_app.deployments.routing.placement`: the node that holds the bytes.
        """
        if self._store is None:
            self._store = await connect_store(self._store_args, self._supervisor)
        begun = time.monotonic()
        if isinstance(sequences, SequenceTable):
            sequences = sequences.sequences()
        work = functools.partial(
            materialize, self._store, sequences, spec, pieces=pieces, allocate=self._bounded
        )
        answer: PackedExperts | list[ray.ObjectRef[PackedExperts]]
        try:
            if self._store_args.backend == "memory":
                answer = packed = await asyncio.to_thread(work)
                nbytes, masked = packed.ids.nbytes, masked_rows(packed)
            else:
                ref, nbytes, masked = await asyncio.to_thread(self._put, work)
                self._underway.keep(ref, nbytes)
                answer = [ref]
        except R3Error as error:
            self._metrics.refused(error)
            raise
        seconds = time.monotonic() - begun
        self._metrics.answered(DecoderAnswer(nbytes, len(sequences), masked, seconds))
        return answer

    def _put(
        self, work: Callable[..., PackedExperts]
    ) -> "tuple[ray.ObjectRef[PackedExperts], int, Counter[str]]":
        try:
            with self._workspace.lend() as allocate:
                packed = work(allocate=functools.partial(self._bounded, make=allocate))
                return ray.put(packed), packed.ids.nbytes, masked_rows(packed)
        except R3Error as error:
            # Serve and Ray keep errors in cycles: with its frames this one would pin the records
            # that were fetched until the garbage collector comes by.
            raise without_frames(error) from None

    def _bounded(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], make: Allocate = np.empty
    ) -> npt.NDArray[Any]:
        """Make an array for an answer, ValueError if no such answer can be given."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._most_bytes:
            raise ValueError(
                f"expected an answer of up to {self._most_bytes} bytes, got {dtype}{list(shape)}"
                f" of {nbytes}: ask for fewer sequences at once, or a rank's slice"
            )
        return make(shape, dtype)

    @functools.cached_property
    def _most_bytes(self) -> int:
        if self._args.max_answer_bytes is not None:
            return self._args.max_answer_bytes
        return sys.maxsize if self._store_args.backend == "memory" else _node_store_bytes()


def _node_store_bytes() -> int:
    return 2 * default_budget(this_node())


class Workspace:
    """Memory that an answer is assembled in before Ray copies it, kept for the next answer.

    The pages of a new array cost as much as the copy into it. Whoever comes while it is lent, or
    needs more than `_KEPT_BYTES`, gets new memory.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._lent = Lock()

    @contextmanager
    def lend(self) -> Iterator[Allocate]:
        """Lend to one answer at a time; its arrays mean nothing after the block."""
        if not self._lent.acquire(blocking=False):
            yield np.empty
            return
        try:
            yield self._array
        finally:
            self._lent.release()

    def _array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > _KEPT_BYTES:
            return np.empty(shape, dtype)
        if nbytes > self._memory.nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(shape)
