"""``shared_store`` as LMDeploy, patched SGLang and xtuner know it, over an application's shards.

A detached actor in their namespace. The shards own the bytes, and remember for it: what was put
through it is under its tag, what was put and read under a second one, and reading a key shortens
its lease to the grace time. So a restart of its process loses nothing, and Ray may send every
call again (``max_task_retries=-1``): a read repeated within the grace time gives the same array;
a put repeated leaves a record that nobody has a key of, until its lease ends.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import numpy.typing as npt
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.assemble.joining import joined
from serve_app.config import CompatNamespace, StoreArgs
from serve_app.errors import (
    KeyUnreadable,
    R3Error,
    RecordError,
    RoutesGap,
    StoreError,
    StoreUnavailable,
)
from serve_app.records import raw_record
from serve_app.store.base import Segments
from serve_app.store.calls import line
from serve_app.store.client import ShardStore, connect
from serve_app.store.directory import COMPAT_NAME, compat_owner, list_shards, this_node
from serve_app.store.presence import is_served

_THREADS = 32
_START_S = 60.0
"""How long a new process may take until it answers."""
_PATIENCE_S = 0.05
"""How long a put may take before somebody asks whether it waits for room."""

Array = npt.NDArray[Any]
P = ParamSpec("P")
T = TypeVar("T")


class CompatStore:
    """What the actor does. Blocking calls run in threads, so its event loop never waits."""

    def __init__(self, app: str, namespace: CompatNamespace, args: StoreArgs) -> None:
        self._app = app
        self._me = ray.get_runtime_context().current_actor
        self._leave_after_s = args.leave_after_s
        self._put_tag = f"compat-{namespace}"
        self._read_tag = f"compat-{namespace}-read"
        self._threads = ThreadPoolExecutor(_THREADS)
        self._store: ShardStore | None = None
        self._connecting = asyncio.Lock()
        self._upkeep = asyncio.get_running_loop().create_task(self._leave_when_unneeded())

    def configure(self, args: StoreArgs) -> None:
        """Take new settings: the next call asks the directory for them."""
        self._leave_after_s = args.leave_after_s
        self._store = None

    async def put(self, array: object) -> str:
        """Keep an integer array ``[rows, layers, top_k]`` as it is; return its key."""
        with _builtin_errors():
            record = await self._run(raw_record, array)
            store = await self._connected()
            put = asyncio.create_task(store.aput(record, tag=self._put_tag))
            while not (await asyncio.wait({put}, timeout=_PATIENCE_S))[0]:
                await self._run(self._make_room, store)
            return put.result()

    async def get(self, key: str) -> Array:
        """Return a key's whole sequence; once, and again within the grace time.

        That holds for keys that the application's engines put too: their readers through this
        actor release nothing.
        """
        with _builtin_errors():
            return await self._run(self._read, await self._connected(), key)

    async def clear(self) -> None:
        """Drop what was put through this actor, and nothing else."""
        with _builtin_errors():
            store = await self._connected()
            await self._run(store.release, tag=self._put_tag)
            await self._run(store.release, tag=self._read_tag)

    def _read(self, store: ShardStore, key: str) -> Array:
        (found,) = store.fetch([key])
        if not isinstance(found, list):
            raise found
        ids = _whole(found)
        with suppress(KeyUnreadable):  # somebody ended it just now; the bytes are here
            if found[-1].meta.raw:
                store.retag([key], self._read_tag)
            store.renew([key], lease_s=store.args.compat_grace_s)
        return ids

    def _make_room(self, store: ShardStore) -> None:
        """Drop what was put and read already, if a put waits for room on this node."""
        with suppress(StoreError):  # the put itself tells what is wrong
            if any(s.waiting_puts for s in store.stats().shards if s.shard == this_node()):
                store.release(tag=self._read_tag)

    async def _connected(self) -> ShardStore:
        async with self._connecting:
            if self._store is None:
                self._store = await self._run(connect, self._app, self._me)
            return self._store

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

    async def _leave_when_unneeded(self) -> None:
        """Exit when the application is gone, after the last of its shards: until then keys read."""
        alone = 0
        while alone < 2:
            await asyncio.sleep(self._leave_after_s)
            alone = 0 if await self._is_needed() else alone + 1
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    async def _is_needed(self) -> bool:
        try:
            return await is_served(self._app) or bool(await self._run(list_shards, self._app))
        except RayError:
            return True


def _whole(segments: Segments) -> Array:
    """Return one array from row 0 on; it has no way to mark a row as not captured."""
    whole = segments[0] if len(segments) == 1 else joined(segments)
    if whole.start or whole.meta.invalid:
        row = 0 if whole.start else whole.meta.invalid[0]
        raise RoutesGap(
            f"row {row} must route natively, which an array from {COMPAT_NAME} cannot say:"
            " materialize the key"
        )
    return whole.ids


@contextmanager
def _builtin_errors() -> Iterator[None]:
    """Raise Python's own errors instead of ours, which a foreign process may lack the code of."""
    try:
        yield
    except R3Error as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyUnreadable):
            raise KeyError(text) from None
        if isinstance(error, (RecordError, RoutesGap)):
            raise ValueError(text) from None
        raise RuntimeError(text) from None


def _actor_class() -> type:
    """Return the actor's class. A class made in a function travels by value.

    Callers in processes that cannot import serve_app need its signatures: without them every call
    of theirs fails with "too many positional arguments" (Ray 2.58). So it mentions nothing of ours
    but inside `__init__`, which runs in the actor only.
    """

    class SharedStore:
        """Upstream's three methods, and two of ours."""

        def __init__(self, app: str, namespace: str, args: object) -> None:
            from serve_app.store.compat import CompatStore

            self._app = app
            self._store: Any = CompatStore(app, namespace, args)  # type: ignore[arg-type]

        async def put(self, data: object) -> object:
            return await self._store.put(data)

        async def get(self, key: str) -> object:
            return await self._store.get(key)

        async def clear(self) -> None:
            await self._store.clear()

        async def r3serve_application(self) -> str:
            return self._app

        async def configure(self, args: object) -> None:
            self._store.configure(args)

    return SharedStore


def open_compat(app: str, namespace: CompatNamespace, args: StoreArgs) -> ActorHandle[Any]:
    """Make the application's ``shared_store`` in a namespace, or find it and give it ``args``.

    Raises `StoreUnavailable` naming who has that name, if it is not this application's.
    """
    node_id = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(_actor_class())
    handle: ActorHandle[Any] = actor.options(
        name=COMPAT_NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0.01,  # an actor that asks for nothing ignores a soft affinity
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=1000,
        # Where the store deployment runs; elsewhere when that node is gone.
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
    ).remote(app, namespace, args)
    name = f"actor {COMPAT_NAME!r} in namespace {namespace!r}"
    try:
        owner = compat_owner(handle, args.call_timeout_s + _START_S)
        if owner == app:
            ray.get(handle.configure.remote(args), timeout=args.call_timeout_s)
            return handle
    except RayError as error:
        raise StoreUnavailable(f"{name} does not answer: {line(error)}") from None
    if owner is None:
        raise StoreUnavailable(
            f"{name} is not ours but {handle!r}: end the engines that made it and the actor"
            f" itself, or take {namespace!r} out of store.compat_actors"
        )
    raise StoreUnavailable(
        f"{name} belongs to application {owner!r}: take {namespace!r} out of the"
        f" store.compat_actors of {owner!r} or {app!r}, or run `r3serve store destroy {owner}`"
    )
