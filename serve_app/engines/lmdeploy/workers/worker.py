"""One GPU's part of the model: LMDeploy's worker with what this adapter changes in it.

Imports LMDeploy's Ray executor: load it when that executor is chosen.
"""

import os
from collections.abc import Callable
from typing import Any

import ray
from lmdeploy.pytorch.engine.executor.ray_executor import RayWorkerWrapper

from serve_app.engines.lmdeploy.patching.adapting import adapt, adapt_agent
from serve_app.engines.lmdeploy.workers.address import Address, free_address

LIVENESS = "liveness"
ASIDE = "aside"
GROUPS = {LIVENESS: 1, ASIDE: 1}
"""Threads of a worker beside the one that runs the model: who is asked there is never behind it."""


class GroupWorker(RayWorkerWrapper):  # type: ignore[misc]  # lmdeploy is untyped
    """A worker of an engine group. All that we change in workers comes in here, or by `run`."""

    def __init__(self, **fields: Any) -> None:
        adapt(fields["misc_config"].enable_return_routed_experts)
        super().__init__(**fields)

    def build_model(self) -> None:
        """Build this GPU's part of the model, and change its agent."""
        super().build_model()
        adapt_agent(self.model_agent)

    @ray.method(concurrency_group=LIVENESS)
    def alive(self) -> str | None:
        """Answer; a process that is stopped does not. None: nothing is wrong."""
        return None

    def identity(self) -> tuple[str, str, int]:
        """Return this worker's node, its GPU's name there, and its process."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return context.get_node_id(), ",".join(map(str, gpus)), os.getpid()

    def address(self) -> Address:
        """Return an address of this node where ranks can meet."""
        return free_address()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with this worker, between two steps of the model."""
        return function(self, *args)

    @ray.method(concurrency_group=ASIDE)
    def run_aside(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that may wait, while the model goes on."""
        return function(self, *args)
