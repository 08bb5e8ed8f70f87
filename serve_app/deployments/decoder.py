"""The decoder deployment: keys to tensors, next to the data; stateless."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.serve.handle import DeploymentHandle

from serve_app.config import DecoderArgs, StoreArgs
from serve_app.deployments.context import connect_store
from serve_app.deployments.store import ExpertStore
from serve_app.errors import R3Error
from serve_app.materialize import Allocate, materialize
from serve_app.store.base import RecordStore
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

    async def materialize(
        self, sequences: Sequence[RoutedSequence], spec: BatchSpec
    ) -> "PackedExperts | list[ray.ObjectRef[PackedExperts]]":
        """Do as `serve_app.materialize.materialize`; answer by reference where there is Ray.

        By value, 100 MB would be written and read again on the way (131 ms instead of 80).
        """
        if self._store is None:
            self._store = await connect_store(self._store_args, self._supervisor)
        if self._store_args.backend == "memory":
            return await asyncio.to_thread(materialize, self._store, sequences, spec)
        return [await asyncio.to_thread(self._put, self._store, sequences, spec)]

    def _put(
        self, store: RecordStore, sequences: Sequence[RoutedSequence], spec: BatchSpec
    ) -> "ray.ObjectRef[PackedExperts]":
        try:
            with self._workspace.lend() as allocate:
                return ray.put(materialize(store, sequences, spec, allocate=allocate))
        except R3Error as error:
            # Serve and Ray keep errors in cycles: with its frames this one would pin the records
            # that were fetched until the garbage collector comes by.
            raise error.with_traceback(None) from None


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
