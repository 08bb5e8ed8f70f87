"""The decoder deployment: keys to tensors, next to the data; stateless."""

import asyncio
from collections.abc import Sequence

import ray
from ray.serve.handle import DeploymentHandle

from serve_app.config import DecoderArgs, StoreArgs
from serve_app.deployments.context import connect_store
from serve_app.deployments.store import ExpertStore
from serve_app.materialize import materialize
from serve_app.store.base import RecordStore
from serve_app.types import BatchSpec, PackedExperts, RoutedSequence


class ExpertDecoder:
    """One decoder replica. What it answers lives until the caller has read it; a retry redoes."""

    def __init__(
        self, args: DecoderArgs, store_args: StoreArgs, store: DeploymentHandle[ExpertStore]
    ) -> None:
        self._args = args
        self._store_args = store_args
        self._supervisor = store
        self._store: RecordStore | None = None

    async def materialize(
        self, sequences: Sequence[RoutedSequence], spec: BatchSpec
    ) -> "PackedExperts | list[ray.ObjectRef[PackedExperts]]":
        """Do as `serve_app.materialize.materialize`; answer by reference where there is Ray.

        By value, 100 MB would be written and read again on the way (131 ms instead of 80).
        """
        if self._store is None:
            self._store = await connect_store(self._store_args, self._supervisor)
        packed = await asyncio.to_thread(materialize, self._store, sequences, spec)
        if self._store_args.backend == "memory":
            return packed
        return [await asyncio.to_thread(ray.put, packed)]
