"""Which engine replica gets a request: the one whose prefix cache has its conversation."""

import random
from collections.abc import Sequence
from hashlib import blake2b

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray names no exports there
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from serve_app.config import EngineArgs
from serve_app.types import GenerateRequest


def by_session(args: EngineArgs) -> RequestRouterConfig:
    """Return the engine's ``request_router_config``: Serve's own where there is no prefix cache."""
    if not args.engine_kwargs.get("enable_prefix_caching"):
        return RequestRouterConfig()
    return RequestRouterConfig.model_validate({"request_router_class": SessionRouter})


def session_of(args: Sequence[object]) -> str | None:
    """Return the session of a call's request, if it has one; over HTTP its id names it."""
    request = next((one for one in args if isinstance(one, GenerateRequest)), None)
    if request is None:
        return None
    named = request.request_id if request.request_id.startswith("session-") else None
    return request.session or named


def home_of(session: str, replicas: Sequence[str]) -> str:
    """Return a session's replica; when one comes or goes, few sessions move (rendezvous)."""
    return max(replicas, key=lambda name: blake2b(f"{session} {name}".encode()).digest())


class SessionRouter(RequestRouter):
    """Sends a session's requests to its replica while that has room, others to the less busy."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas in ranks; the next is tried when those before have no room."""
        anywhere = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [anywhere]
        # Or the base class asks again without a pause while all replicas are busy.
        pending_request.routing_context.should_backoff = True
        session = session_of(pending_request.args)
        if session is None or not candidate_replicas:
            return [anywhere]
        by_name = {str(one.replica_id.unique_id): one for one in candidate_replicas}
        return [[by_name[home_of(session, list(by_name))]], anywhere]

    def _get_next_pending_request_to_route(self) -> PendingRequest | None:
        """Return a call that no routing task works on, or else one that is still without a replica.

        The base class drops a call when the task that took it ends because there are more tasks
        than calls (seen in Ray 2.58.1): it would wait for ever.
        """
        untaken: PendingRequest | None = super()._get_next_pending_request_to_route()
        waiting = (one for one in self._pending_requests_to_fulfill if not one.future.done())
        return untaken or next(waiting, None)
