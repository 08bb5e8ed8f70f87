"""The store deployment: supervises the application's shards, which outlive it."""

import asyncio

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.config import StoreArgs
from serve_app.deployments.metrics import StoreMetrics
from serve_app.errors import StoreUnavailable
from serve_app.store.access.client import connect
from serve_app.store.access.compat import open_compat
from serve_app.store.base import RecordStore
from serve_app.store.owner.directory import (
    COMPAT_NAMESPACES,
    find_compat,
    find_shard,
    list_shards,
    open_directory,
)
from serve_app.store.owner.memory import shared
from serve_app.types import StoreStats


class ExpertStore:
    """Gives shards their settings and reports on them; no record passes through it."""

    def __init__(self, args: StoreArgs) -> None:
        self._args = args
        self._metrics = StoreMetrics()
        self._store: RecordStore
        if args.backend == "memory":
            _refuse_replica()
            self._store = shared("local", args)
            return
        self._app = app = serve.get_replica_context().app_name
        self._directory = open_directory(app, args, args.call_timeout_s)
        shards = [find_shard(app, name) for name in list_shards(app)]
        ray.get([s.configure.remote(args) for s in shards if s], timeout=args.call_timeout_s)
        self._store = connect(app)
        for namespace in COMPAT_NAMESPACES:
            if namespace in args.compat_actors:
                open_compat(app, namespace, args)
            elif unwanted := find_compat(app, namespace):
                ray.kill(unwanted)  # an earlier deployment of this application named it

    def ready(self) -> None:
        """Answer once the store can be used."""

    async def stats(self) -> StoreStats:
        """Return what all shards hold and what happened so far."""
        return await asyncio.to_thread(self._store.stats)

    async def check_health(self) -> None:
        """Make sure that the directory is there and knows these arguments."""
        if self._args.backend == "memory":
            return
        try:
            await asyncio.wait_for(
                self._directory.configure.remote(self._args), self._args.call_timeout_s
            )
        except (RayError, TimeoutError) as error:
            raise StoreUnavailable(f"the store's directory does not answer: {error}") from None
        self._metrics.supervises(len(await asyncio.to_thread(list_shards, self._app)))


def _refuse_replica() -> None:
    try:
        serve.get_replica_context()
    except RayServeException:
        return
    raise ValueError(
        "store backend 'memory' works in Serve's local testing mode only: replicas are separate"
        " processes, so expected backend 'shards', got 'memory'"
    )
