"""Which decoder replica gets a call: one on the node that holds the bytes.

Slicing there, only a rank's slice crosses the wire; elsewhere whole records do.
"""

from collections.abc import Sequence
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray names no exports there
    PendingRequest,
    RunningReplica,
)

from serve_app.config import DecoderArgs
from serve_app.deployments.routing.patient_router import PatientRouter


def near_bytes(args: DecoderArgs) -> RequestRouterConfig:
    """Return the ``request_router_config`` of the decoder deployment."""
    return RequestRouterConfig.model_validate(
        {
            "request_router_class": NearBytesRouter,
            "request_router_kwargs": {"wait_s": args.near_wait_s},
        }
    )


class NearBytesRouter(PatientRouter):
    """Prefers replicas on the node that a call's keyword ``near`` names, by its id's beginning.

    While they are busy a call waits ``wait_s`` before any replica will do; without one there, or
    without ``near``, it takes the less busy of two.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the ``request_router_kwargs``."""
        self._wait_s = float(kwargs["wait_s"])

    def preferred(
        self, replicas: Sequence[RunningReplica], call: PendingRequest
    ) -> list[RunningReplica]:
        """Return the replicas beside the bytes."""
        near = call.kwargs.get("near")
        return [one for one in replicas if near and (one.node_id or "")[:10] == near]

    def insists(self, call: PendingRequest) -> bool:
        """Slicing elsewhere moves whole records, so a short wait is the better deal."""
        return bool(self._get_curr_time_s() - call.created_at < self._wait_s)
