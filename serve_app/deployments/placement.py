"""Which decoder replica gets a call: one on the node that holds the bytes.

Slicing there, only a rank's slice crosses the wire; elsewhere whole records do.
"""

import random
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray names no exports there
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from serve_app.config import DecoderArgs


def near_bytes(args: DecoderArgs) -> RequestRouterConfig:
    """Return the ``request_router_config`` of the decoder deployment."""
    return RequestRouterConfig.model_validate(
        {
            "request_router_class": NearBytesRouter,
            "request_router_kwargs": {"wait_s": args.near_wait_s},
        }
    )


class NearBytesRouter(RequestRouter):
    """Prefers replicas on the node that a call's keyword ``near`` names, by its id's beginning.

    While they are busy a call waits ``wait_s`` before any replica will do; without one there, or
    without ``near``, it takes the less busy of two. Not `FIFOMixin`: that gives the replica that
    was chosen for one call to whichever waits longest.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the ``request_router_kwargs``."""
        self._wait_s = float(kwargs["wait_s"])

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
        near = pending_request.kwargs.get("near")
        beside = [one for one in candidate_replicas if near and (one.node_id or "")[:10] == near]
        if not beside:
            return [anywhere]
        waited_s = self._get_curr_time_s() - pending_request.created_at
        return [beside] if waited_s < self._wait_s else [beside, anywhere]

    def _get_next_pending_request_to_route(self) -> PendingRequest | None:
        """Return a call that no routing task works on, or else one that is still without a replica.

        The base class drops a call when the task that took it ends because there are more tasks
        than calls (seen in Ray 2.58.1): it would wait for ever.
        """
        untaken: PendingRequest | None = super()._get_next_pending_request_to_route()
        waiting = (one for one in self._pending_requests_to_fulfill if not one.future.done())
        return untaken or next(waiting, None)
