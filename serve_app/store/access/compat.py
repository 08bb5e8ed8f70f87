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
from contextvars import Context
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
    UnknownKey,
    without_frames,
)
from serve_app.records import raw_record
from serve_app.store.access.calls import line
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.base import Segments
from serve_app.store.owner.directory import COMPAT_NAME, compat_owner, list_shards, this_node
from serve_app.store.owner.presence import is_served
from serve_app.store.protocol import ask_protocol, check_protocol

_THREADS = 32
_READERS = 4
"""How many batches of reads overlap, so that a shard which is slow holds up one of them."""
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
        self._wanted: list[tuple[str, asyncio.Future[Array]]] = []
        self._readers: set[asyncio.Task[None]] = set()
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
            if not isinstance(key, str):
                raise UnknownKey(f"a key is a str, got {type(key).__name__}")
            read: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
            self._wanted.append((key, read))
            if len(self._readers) < _READERS:
                reader = asyncio.create_task(self._serve_wanted(), context=Context())
                self._readers.add(reader)
                reader.add_done_callback(self._readers.discard)
            return await read

    async def clear(self) -> None:
        """Drop what was put through this actor, and nothing else."""
        with _builtin_errors():
            store = await self._connected()
            await self._run(store.release, tag=self._put_tag)
            await self._run(store.release, tag=self._read_tag)

    async def _serve_wanted(self) -> None:
        """Read what waits, together: one call a shard for all of it, not one a key."""
        while self._wanted:
            wanted, self._wanted = self._wanted, []
            try:
                store = await self._connected()
                answers = await self._run(self._read, store, [key for key, _ in wanted])
            except Exception as error:  # noqa: BLE001  (whatever it is belongs to the callers)
                for _, read in wanted:
                    if not read.cancelled():
                        read.set_exception(error)
                continue
            for (_, read), answer in zip(wanted, answers, strict=True):
                if read.cancelled():
                    continue
                if isinstance(answer, R3Error):
                    read.set_exception(answer)
                else:
                    read.set_result(answer)

    def _read(self, store: ShardStore, keys: list[str]) -> list[Array | R3Error]:
        answers: list[Array | R3Error] = []
        raw: dict[str, bool] = {}
        for key, found in zip(keys, store.fetch(keys), strict=True):
            try:
                answers.append(_whole(found) if isinstance(found, list) else found)
            except R3Error as error:
                answers.append(without_frames(error))
            if isinstance(found, list) and not isinstance(answers[-1], R3Error):
                raw[key] = found[-1].meta.raw is not None
        with suppress(StoreUnavailable):  # the bytes are here; the keys end with their leases
            self._begin_grace(store, raw)
        return answers

    def _begin_grace(self, store: ShardStore, read: dict[str, bool]) -> None:
        """Shorten the leases of keys that were read; those that map to True were put here."""
        try:
            store.retag([key for key, raw in read.items() if raw], self._read_tag)
            store.renew(list(read), lease_s=store.args.compat_grace_s)
        except KeyUnreadable:  # one of them ended just now, and stays ended
            if len(read) > 1:
                for key, raw in read.items():
                    self._begin_grace(store, {key: raw})

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
        """Upstream's three methods, and three of ours."""

        def __init__(self, app: str, namespace: str, args: object) -> None:
            from serve_app.store.access.compat import CompatStore

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

        async def r3serve_protocol(self) -> int:
            from serve_app.store.protocol import PROTOCOL

            return PROTOCOL

        async def configure(self, args: object) -> None:
            self._store.configure(args)

    return SharedStore


def open_compat(app: str, namespace: CompatNamespace, args: StoreArgs) -> ActorHandle[Any]:
    """Make the application's ``shared_store`` in a namespace, or find it and give it ``args``.

    Raises `StoreUnavailable` naming who has that name, if it is not this application's, and
    `StoreError` if another version of r3serve began it.
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
            _check_version(handle, namespace, app, args.call_timeout_s)
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


def _check_version(
    actor: ActorHandle[Any], namespace: CompatNamespace, app: str, timeout_s: float
) -> None:
    what = f"{COMPAT_NAME} in namespace {namespace!r}"
    check_protocol(ray.get(ask_protocol(actor, what, app), timeout=timeout_s), what, app)
