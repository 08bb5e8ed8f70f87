"""An application's directory and shards: their names, how they are made, who explains lost keys.

All are detached actors in one namespace, made by whoever needs them first (``get_if_exists``
lets only one win). They belong to the application, not to a deployment: `serve deploy` with
other arguments finds them again.
"""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import ray
from ray.actor import ActorHandle
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.config import CompatNamespace, StoreArgs
from serve_app.errors import KeyUnreadable, RoutesLost, StoreUnavailable, without_frames
from serve_app.store.keys import verify
from serve_app.store.owner.shard import Shard, ShardIdentity
from serve_app.store.protocol import PROTOCOL, ask_protocol, check_protocol

NAMESPACE = "r3serve"
COMPAT_NAME = "shared_store"
COMPAT_NAMESPACES: tuple[CompatNamespace, ...] = get_args(CompatNamespace)
_COMPAT_TIMEOUT_S = 5.0
_RECALL_S = 2.0
_NAME_POLL_S = 0.02
_DIRECTORY = "directory"
STORE = "store"
"""What its actors are called where they are refused."""
_SHARD_ID = re.compile("[0-9a-f]{10}")


@dataclass(frozen=True, slots=True)
class Settings:
    """What every process that touches an application's store must know."""

    secret: bytes
    args: StoreArgs


class Directory:
    """Holds the application's secret and settings; runs as a small detached actor.

    Its process may begin anew: it has the secret from its arguments, and the shards know which
    epochs they took over.
    """

    def __init__(self, app: str, secret: bytes, args: StoreArgs) -> None:
        self._app = app
        self._settings = Settings(secret, args)
        self._secrets = [secret]
        self._moved: dict[int, str] = {}
        # Asked when there is a question: a shard may not be up yet.
        self._forgot = ray.get_runtime_context().was_current_actor_reconstructed

    def r3serve_protocol(self) -> int:
        """Say what this actor understands."""
        return PROTOCOL

    def settings(self) -> Settings:
        """Return the secret and the newest arguments."""
        return self._settings

    def configure(self, args: StoreArgs) -> None:
        """Take the arguments of a new deployment."""
        self._settings = Settings(self._settings.secret, args)

    def adopt(self, secret: bytes, epochs: Sequence[int], shard: str) -> None:
        """Remember that a shard answers for the restored records of earlier epochs."""
        self._moved.update(dict.fromkeys(epochs, shard))
        if secret not in self._secrets:
            self._secrets.append(secret)

    def moved(self, epochs: Sequence[int]) -> dict[int, str]:
        """Return the shards that took over those of the epochs that were restored."""
        self._recall()
        return {epoch: self._moved[epoch] for epoch in epochs if epoch in self._moved}

    def explain(self, keys: Sequence[str]) -> list[KeyUnreadable]:
        """Say of keys whose shard is gone whether they were ever real."""
        self._recall()
        reasons: list[KeyUnreadable] = []
        for key in keys:
            try:
                verify(key, self._app, *self._secrets)
            except KeyUnreadable as why:
                reasons.append(without_frames(why))
            else:
                reasons.append(RoutesLost("the shard that held the bytes is gone"))
        return reasons

    def _recall(self) -> None:
        """Ask the shards what they took over, where this process cannot know."""
        if not self._forgot:
            return
        shards = {shard: find_shard(self._app, shard) for shard in list_shards(self._app)}
        asked: dict[Any, str] = {
            actor.adopted.remote(): shard for shard, actor in shards.items() if actor
        }
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_RECALL_S)
        answered = not late
        for ref in ready:
            try:
                adopted: dict[int, bytes] = ray.get(ref)
            except ray.exceptions.RayError:
                answered = False
                continue
            for epoch, secret in adopted.items():
                self.adopt(secret, [epoch], asked[ref])
        self._forgot = not answered


def shard_name(app: str, shard: str) -> str:
    """Return the actor name of a shard."""
    return f"{app}/{shard}"


def this_node() -> str:
    """Return the id of this process's node, as shards and keys have it."""
    return str(ray.get_runtime_context().get_node_id())[:10]


def this_cluster() -> str:
    """Name the Ray cluster that this process asks, for errors: a machine may run several."""
    return f"the Ray cluster at {ray.get_runtime_context().gcs_address}"


def open_directory(app: str, args: StoreArgs, timeout_s: float) -> ActorHandle[Any]:
    """Make the application's directory, or find it and give it ``args``.

    Raises `StoreUnavailable` if it does not answer in ``timeout_s`` seconds, and `StoreError` if
    it is one of another version of r3serve.
    """
    actor: Any = ray.remote(Directory)
    options = actor.options(
        name=shard_name(app, _DIRECTORY),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy="DEFAULT",  # not in its maker's placement group, which it outlives
        max_task_retries=-1,  # all its calls are idempotent: they wait while it starts elsewhere
    )

    def make() -> ActorHandle[Any]:
        made: ActorHandle[Any] = options.remote(app, secrets.token_bytes(32), args)
        return made

    try:
        _, theirs = _opened(make, lambda found: ask_protocol(found, STORE, app), timeout_s)
        check_protocol(theirs, STORE, app)
        directory, _ = _opened(make, lambda found: found.configure.remote(args), timeout_s)
    except ray.exceptions.RayError as error:
        raise StoreUnavailable(f"the directory of {app!r} does not answer: {error}") from None
    return directory


def _opened(
    make: Callable[[], ActorHandle[Any]],
    ask: "Callable[[ActorHandle[Any]], ray.ObjectRef[Any]]",
    timeout_s: float,
) -> tuple[ActorHandle[Any], Any]:
    """Make a named actor or find it; return it and what it answers.

    A name may lead to an actor that is being removed, longest in processes that know it, or that
    has just been killed and begins anew: then it is looked for again until the time is over.
    """
    give_up = time.monotonic() + timeout_s
    while True:
        actor = make()
        try:
            return actor, ray.get(ask(actor), timeout=max(0.0, give_up - time.monotonic()))
        except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError):
            if time.monotonic() > give_up:
                raise
            time.sleep(_NAME_POLL_S)


def find_directory(app: str) -> ActorHandle[Any]:
    """Find an application's directory; raise `StoreUnavailable` if it has none."""
    try:
        return ray.get_actor(shard_name(app, _DIRECTORY), namespace=NAMESPACE)
    except ValueError:
        raise StoreUnavailable(
            f"no expert store of an application named {app!r} runs in {this_cluster()}"
        ) from None


def open_shard(app: str, settings: Settings) -> tuple[ActorHandle[Any], str | None]:
    """Make this node's shard, or find it; return it and the address of its door.

    Raises `StoreUnavailable` if the name is taken.
    """
    shard, timeout_s = this_node(), settings.args.call_timeout_s
    node_id = ray.get_runtime_context().get_node_id()
    # Hard affinity: actors that ask for no resources ignore a soft one.
    actor: Any = ray.remote(Shard)
    options = actor.options(
        name=shard_name(app, shard),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=1000,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    )
    try:
        handle, identity = _opened(
            lambda: options.remote(app, shard, settings.secret, settings.args),
            lambda found: found.identity.remote(),
            timeout_s,
        )
    except (AttributeError, ray.exceptions.RayError) as error:
        raise StoreUnavailable(f"shard {shard} does not answer: {error}") from None
    if not isinstance(identity, ShardIdentity) or identity.app != app:
        raise StoreUnavailable(f"actor {shard_name(app, shard)!r} is not a shard of {app!r}")
    return handle, identity.door


def list_shards(app: str) -> list[str]:
    """Return the ids of the application's shards that have a name now."""
    return sorted(name for name in _names(app) if _SHARD_ID.fullmatch(name))


def list_actors(app: str) -> list[ActorHandle[Any]]:
    """Return the application's detached actors: shards, directory and whatever else it has."""
    found = [find_shard(app, name) for name in _names(app)]
    found += [find_compat(app, namespace) for namespace in COMPAT_NAMESPACES]
    return [actor for actor in found if actor is not None]


def remove_actors(app: str, timeout_s: float) -> int:
    """Kill the application's detached actors, and every record with them; return how many.

    Returns when their names are free again. Raises `StoreUnavailable` if some are not in
    ``timeout_s`` seconds.
    """
    killed = set(list_actors(app))
    for actor in killed:
        ray.kill(actor)  # returns before anything has happened
    give_up = time.monotonic() + timeout_s
    while left := killed.intersection(list_actors(app)):
        if time.monotonic() > give_up:
            raise StoreUnavailable(f"{len(left)} actors of {app!r} are still up")
        time.sleep(_NAME_POLL_S)
    return len(killed)


def find_compat(app: str, namespace: CompatNamespace) -> ActorHandle[Any] | None:
    """Find the application's ``shared_store`` in a namespace, None if there is none of its own."""
    try:
        actor: ActorHandle[Any] = ray.get_actor(COMPAT_NAME, namespace=namespace)
        return actor if compat_owner(actor, _COMPAT_TIMEOUT_S) == app else None
    except (ValueError, ray.exceptions.RayError):
        return None


def compat_owner(actor: ActorHandle[Any], timeout_s: float) -> str | None:
    """Return the application that a ``shared_store`` belongs to, None if upstream made it."""
    try:
        return str(ray.get(actor.r3serve_application.remote(), timeout=timeout_s))
    except AttributeError:
        return None


def _names(app: str) -> list[str]:
    prefix = shard_name(app, "")
    return [
        actor["name"].removeprefix(prefix)
        for actor in list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    ]


def find_shard(app: str, shard: str) -> ActorHandle[Any] | None:
    """Find a shard by its id, None if it is gone."""
    try:
        return ray.get_actor(shard_name(app, shard), namespace=NAMESPACE)
    except ValueError:
        return None
