"""What our request routers mend in Ray's: no call is forgotten, none is asked for in a spin."""

import random
from abc import abstractmethod
from collections.abc import Sequence

from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray names no exports there
    PendingRequest,
    RequestRouter,
    RunningReplica,
)


class PatientRouter(RequestRouter):
    """Ranks replicas by `preferred`, then takes the less busy of any two.

    Not `FIFOMixin`: that gives the replica that was chosen for one call to whichever waits longest.
    """

    @abstractmethod
    def preferred(
        self, replicas: Sequence[RunningReplica], call: PendingRequest
    ) -> list[RunningReplica]:
        """Return the replicas to ask first; none where any will do."""

    @abstractmethod
    def insists(self, call: PendingRequest) -> bool:
        """Tell whether a call still waits for a preferred replica rather than take any."""

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
        first = self.preferred(candidate_replicas, pending_request)
        if not first:
            return [anywhere]
        return [first] if self.insists(pending_request) else [first, anywhere]

    def _get_next_pending_request_to_route(self) -> PendingRequest | None:
        """Return a call that no routing task works on, or else one that is still without a replica.

        The base class drops a call when the task that took it ends because there are more tasks
        than calls (seen in Ray 2.58.1): it would wait for ever.
        """
        untaken: PendingRequest | None = super()._get_next_pending_request_to_route()
        waiting = (one for one in self._pending_requests_to_fulfill if not one.future.done())
        return untaken or next(waiting, None)
