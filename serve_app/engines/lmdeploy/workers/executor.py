"""LMDeploy's Ray executor with workers of ours, in the bundles that are theirs.

What LMDeploy 0.18 does otherwise, and why not: it takes the first GPU bundles of the placement
group, so that two engines in one group would share GPUs; lets tensor parallel ranks meet at the
head's address, where nothing of ours runs; waits without a limit; and frees each step's inputs by
a function that Ray 2.59 removed. Imports LMDeploy: load it when that executor is chosen.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import ray
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.engine.executor import ray_executor
from lmdeploy.pytorch.engine.executor.ray_executor import RayExecutor
from lmdeploy.pytorch.ray import RayContext
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.engines.lmdeploy.workers.seat import Seat
from serve_app.engines.lmdeploy.workers.watch import Watch
from serve_app.engines.lmdeploy.workers.worker import GROUPS, GroupWorker
from serve_app.errors import EngineUnavailable

_STOP_S = 10.0


class BorrowedRay(RayContext):  # type: ignore[misc]  # lmdeploy is untyped
    """Leaves Ray alone: LMDeploy's own ends the replica's connection when an engine ends."""

    def shutdown(self) -> None:
        """Give back the placement group, if LMDeploy had to make one."""
        if self.owned_pg:
            ray.util.remove_placement_group(self.placement_group)


class GroupExecutor(RayExecutor):  # type: ignore[misc]
    """Drives one engine's workers; `watch` tells when one of them can no longer be."""

    watch: Watch

    def __init__(
        self,
        seat: Seat,
        start_s: float,
        answer_s: float,
        worker: type[GroupWorker],
        **fields: Any,
    ) -> None:
        self._seat = seat
        self._start_s, self._answer_s = start_s, answer_s
        self._worker = worker
        self._inputs_taken: list[Any] = []
        try:
            super().__init__(**fields)
        except BaseException as error:
            self._give_up(error)
            raise

    def init(self) -> None:
        """Load the model into the workers."""
        try:
            super().init()
        except BaseException as error:
            self._give_up(error)
            raise
        self.watch.up()

    async def forward_async(self, inputs: Any) -> None:
        """Send a step to all workers once they have taken the one before."""
        if self._inputs_taken:
            await asyncio.gather(*self._inputs_taken)
        sent = ray.put(inputs)
        self._inputs_taken = [worker.forward_async.remote(sent) for worker in self.workers]
        self._connector_steps.append(inputs.get("kv_connector_metadata") is not None)

    def each(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function with every worker at once; large arguments cross a node once. Blocks."""
        sent = [ray.put(one) for one in args]
        calls = [worker.run.remote(function, *sent) for worker in self.workers]
        return ray.get(calls, timeout=self._start_s)

    def stop(self) -> None:
        """Let the workers come to rest. Ranks that step together cannot stop one by one."""
        if self.dp > 1 or self.watch.failed is not None:
            return
        try:
            self.collective_rpc("stop_async", timeout=_STOP_S)
        except (RayError, GetTimeoutError) as error:
            ray_executor.logger.warning(f"workers did not stop, they are killed: {error}")

    def release(self) -> None:
        """End the workers."""
        self._end()

    def _give_up(self, error: BaseException) -> None:
        """End what there is; where the watch knows better why, raise that."""
        why = self.watch.failed if hasattr(self, "watch") else None
        self._end()
        if why is not None:
            raise EngineUnavailable(f"LMDeploy's workers did not start: {why}") from error

    def _end(self) -> None:
        if hasattr(self, "watch"):
            self.watch.end()
        if hasattr(self, "ray_ctx"):
            self.ray_ctx.shutdown()

    def _sort_workers(self, driver_ip: str, workers: list[Any]) -> list[Any]:
        """Keep the order of the bundles: the first worker has named the meeting."""
        return workers

    def _init_workers_ray(self, placement_group: Any, worker_kwargs: dict[str, Any]) -> list[Any]:
        specs = placement_group.bundle_specs
        own = self._seat.bundles or [n for n, each in enumerate(specs) if each.get("GPU")]
        count = self.dist_config.attn_tp
        if len(own) < count:
            raise ValueError(
                f"expected a placement group with a GPU bundle for each of {count} workers,"
                f" got bundles {specs}"
            )
        runtime_env = ray_executor._update_runtime_envs({})
        if self._needs_symm_mem_device_setup:  # peers' devices must stay visible
            runtime_env["env_vars"]["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": GROUPS}
        actor = ray.remote(**options)(self._worker)
        workers = [
            actor.options(
                num_gpus=min(specs[bundle]["GPU"], 1),
                runtime_env=runtime_env if runtime_env["env_vars"] else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group,
                    placement_group_bundle_index=bundle,
                    placement_group_capture_child_tasks=True,
                ),
            ).remote(**worker_kwargs)
            for bundle in own[:count]
        ]
        self.watch = Watch("worker", workers, self._start_s, self._answer_s)
        if self.dp == 1:
            address: Any = workers[0].address
            meeting = ray.get(address.remote(), timeout=self._start_s)
            self.master_addr, self.master_port = meeting
        return workers


def sit(seat: Seat, start_s: float, answer_s: float, worker: type[GroupWorker] | None) -> None:
    """Let the next engine of this process have its workers there; see `Watch` for their limits."""
    if seat.meeting is not None:
        envs.dp_master_addr, envs.dp_master_port = seat.meeting[0], str(seat.meeting[1])
    ray_executor.RayContext = BorrowedRay
    ray_executor.RayExecutor = functools.partial(
        GroupExecutor, seat, start_s, answer_s, worker or GroupWorker
    )
