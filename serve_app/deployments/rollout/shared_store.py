"""LMDeploy's way into our store: the actor ``shared_store``, which must be ours and come first."""

import time

import ray
from ray.exceptions import RayError

from serve_app.config import EngineArgs, StoreArgs
from serve_app.store.owner.directory import COMPAT_NAME, compat_owner

NAMESPACE = "lmdeploy"
_PAUSE_S = 0.2


def puts_itself(args: EngineArgs) -> bool:
    """Whether LMDeploy itself is to put routes, and not this replica."""
    theirs = args.engine_kwargs.get("transfer") == "lmdeploy"
    return args.backend == "lmdeploy" and args.enable_transfer_obj_ref and theirs


def wait_for_shared_store(app: str, args: StoreArgs, timeout_s: float = 60.0) -> None:
    """Block until the store deployment has made the application's actor.

    LMDeploy makes one of its own if it finds none, and destroys what is read from that. Raises
    ValueError where ours is not asked for, is somebody else's or does not come.
    """
    if NAMESPACE not in args.compat_actors:
        raise ValueError(
            "engine_kwargs: transfer 'lmdeploy' puts into shared_store, which this application does"
            f" not offer: expected store.compat_actors [{NAMESPACE}],"
            f" got {list(args.compat_actors)}"
        )
    ends, owner = time.monotonic() + timeout_s, None
    while time.monotonic() < ends:
        try:
            actor = ray.get_actor(COMPAT_NAME, namespace=NAMESPACE)
            owner = compat_owner(actor, args.call_timeout_s) or "LMDeploy"
        except (ValueError, RayError):
            time.sleep(_PAUSE_S)
            continue
        if owner == app:
            return
        break
    raise ValueError(
        f"expected {COMPAT_NAME} in namespace {NAMESPACE!r} to belong to {app!r} within"
        f" {timeout_s:g} s, it belongs to {owner or 'nobody'}"
    )
