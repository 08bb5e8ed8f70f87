"""Which engine replica gets a request: the one whose prefix cache has its conversation."""

from collections.abc import Sequence
from hashlib import blake2b

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray names no exports there
    PendingRequest,
    RunningReplica,
)

from serve_app.config import EngineArgs
from serve_app.deployments.routing.patient_router import PatientRouter
from serve_app.sessions import is_session
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
    named = request.request_id if is_session(request.request_id) else None
    return request.session or named


def home_of(session: str, replicas: Sequence[str]) -> str:
    """Return a session's replica; when one comes or goes, few sessions move (rendezvous)."""
    return max(replicas, key=lambda name: blake2b(f"{session} {name}".encode()).digest())


class SessionRouter(PatientRouter):
    """Sends a session's requests to its replica while that has room, others to the less busy."""

    def preferred(
        self, replicas: Sequence[RunningReplica], call: PendingRequest
    ) -> list[RunningReplica]:
        """Return the home of the call's session, if it has one."""
        session = session_of(call.args)
        if session is None or not replicas:
            return []
        by_name = {str(one.replica_id.unique_id): one for one in replicas}
        return [by_name[home_of(session, list(by_name))]]

    def insists(self, call: PendingRequest) -> bool:
        """Any replica with room is better than a queue."""
        return False
