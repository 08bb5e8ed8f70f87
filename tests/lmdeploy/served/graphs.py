"""Graphs of LMDeploy replicas on the tests' cluster, begun and removed."""

from pathlib import Path
from typing import Any

from ray import serve

from serve_app import RoutedExpertsClient
from serve_app.config import EngineArgs, StoreArgs
from serve_app.store.owner.directory import remove_actors
from tests.eventually import eventually
from tests.lmdeploy.served.replicas import build

START_S = 180.0
SMALL = {"eager_mode": True, "num_gpu_blocks": 400, "block_size": 16, "max_prefill_token_num": 512}


def served(
    name: str,
    model: Path,
    replicas: int = 1,
    *,
    context_length: int | None = None,
    max_batch_size: int = 8,
    bundles: tuple[dict[str, float], ...] = (),
    **kwargs: Any,
) -> RoutedExpertsClient:
    """Serve a small engine; ``kwargs`` are its ``engine_kwargs``."""
    options: dict[str, Any] = {"min_replicas": replicas, "max_replicas": replicas, "num_cpus": 0.1}
    if bundles:
        options |= {"placement_group_bundles": bundles, "placement_group_strategy": "PACK"}
    engine = EngineArgs.model_validate(
        {
            "backend": "lmdeploy",
            "model": str(model),
            "dtype": "float16",
            "max_batch_size": max_batch_size,
            "context_length": context_length,
            "enable_return_routed_experts": True,
            "enable_transfer_obj_ref": True,
            # Tests share two cores with everything that they start.
            "engine_kwargs": {**SMALL, "liveness_timeout_s": 60.0, **kwargs},
            "serve": options,
        }
    )
    store = StoreArgs.model_validate(
        {"compat_actors": ["lmdeploy"] if "transfer" in kwargs else []}
    )
    target = serve.RunTarget(build(engine, store), name=name, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    _wait_for(name)
    return RoutedExpertsClient(name)


def _wait_for(name: str) -> None:
    """Wait until an application runs; Serve would wait for ever where it cannot be placed."""

    def settled() -> bool:
        return serve.status().applications[name].status != "DEPLOYING"

    assert eventually(settled, START_S), serve.status().applications[name]
    assert serve.status().applications[name].status == "RUNNING"


def remove(name: str) -> None:
    """End a graph and its store."""
    serve.delete(name)
    remove_actors(name, 30)
