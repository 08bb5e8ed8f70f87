"""Where a deployment finds itself: its application, its actor, its store."""

import asyncio

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.config import StoreArgs
from serve_app.deployments.store import ExpertStore
from serve_app.store.access.client import connect
from serve_app.store.base import RecordStore
from serve_app.store.owner.memory import shared

LOCAL_APP = "local"


def application() -> str:
    """Return the name of the application that this replica serves."""
    try:
        return serve.get_replica_context().app_name
    except RayServeException:
        return LOCAL_APP  # Serve's local testing mode has no replicas


def is_local() -> bool:
    """Tell Serve's local testing mode, where nothing runs in a replica."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return True
    return False


def replica_id() -> str:
    """Return this replica's name, unique in its deployment."""
    try:
        return serve.get_replica_context().replica_tag
    except RayServeException:
        return LOCAL_APP


async def connect_store(
    args: StoreArgs, supervisor: DeploymentHandle[ExpertStore], app: str | None = None
) -> RecordStore:
    """Wait until the store deployment is up, then connect this actor to its shards.

    ``app`` is the application's name where no replica asks.
    """
    app = app or application()
    if args.backend == "memory":
        return shared(app, args)
    await asyncio.wait_for(supervisor.ready.remote(), args.put_timeout_s)
    me = ray.get_runtime_context().current_actor
    return await asyncio.to_thread(connect, app, me)
