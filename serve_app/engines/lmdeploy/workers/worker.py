"""One GPU's part of the model: LMDeploy's worker with what this adapter changes in it.

Imports LMDeploy's Ray executor: load it when that executor is chosen.
"""

from collections.abc import Callable
from typing import Any

import ray
from lmdeploy.pytorch.engine.executor.ray_executor import RayWorkerWrapper

from serve_app.engines.lmdeploy.patching.adapting import adapt, adapt_agent
from serve_app.engines.lmdeploy.workers.address import Address, free_address
from serve_app.engines.lmdeploy.workers.watch import LIVENESS

ASIDE = "aside"
GROUPS = {LIVENESS: 1, ASIDE: 1}
"""Threads of a worker beside the one that runs the model: who is asked there is never behind it."""


class GroupWorker(RayWorkerWrapper):  # type: ignore[misc]  # lmdeploy is untyped
    """A worker of an engine group. All that we change in workers comes in here, or by `run`."""

    _wrong: str | None = None

    def __init__(self, **fields: Any) -> None:
        adapt(fields["misc_config"].enable_return_routed_experts)
        super().__init__(**fields)

    def init_process_group(self, *where: Any) -> None:
        """Meet the other ranks. One that cannot says so to the watch: the others would wait."""
        try:
            super().init_process_group(*where)
        except Exception as error:
            self._wrong = f"it cannot meet the others: {type(error).__name__}: {error}"
            raise

    def build_model(self) -> None:
        """Build this GPU's part of the model, and change its agent."""
        super().build_model()
        adapt_agent(self.model_agent)

    @ray.method(concurrency_group=LIVENESS)
    def alive(self) -> str | None:
        """Answer; a process that is stopped does not. None: nothing is wrong."""
        return self._wrong

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
