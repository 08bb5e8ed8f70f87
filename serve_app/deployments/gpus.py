"""Are there the GPUs that an engine's replicas ask for? Serve itself would wait for ever."""

import ray
from ray._private.state import state
from ray.serve.exceptions import RayServeException

from serve_app.config import EngineArgs


def check_gpus(args: EngineArgs) -> None:
    """Raise `RayServeException` where no node has a replica's GPUs, now or when scaled up.

    Of that alone Serve shows the bare message, and no traceback.
    """
    if not ray.is_initialized() or not (needed := args.serve.gpus_per_replica):
        return
    here: float = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    later = state.get_max_resources_from_cluster_config() or {}
    if max(here, later.get("GPU", 0)) < needed:
        raise RayServeException(
            f"engine.serve asks for {needed:g} GPU a replica and this cluster has {here:g}: start"
            " Ray on a machine with GPUs, or take graphs/rollout.yaml, whose engine runs on CPUs"
        )
