"""LMDeploy's PyTorch engine in this process: started, watched, put to sleep and ended.

Its `Engine` itself, not `AsyncEngine`: that one makes text and knows chats, closes Ray, and has
nothing else that a rollout needs. Imports LMDeploy: load it when it is chosen.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from lmdeploy import GenerationConfig, PytorchEngineConfig
from lmdeploy.messages import ResponseType
from lmdeploy.pytorch.engine import Engine
from lmdeploy.utils import get_logger

from serve_app.engines.lmdeploy.options import LmdeployOptions
from serve_app.engines.lmdeploy.patching.adapting import adapt, adapt_agent
from serve_app.engines.lmdeploy.sequence import keep_rows
from serve_app.engines.lmdeploy.workers.seat import Seat
from serve_app.errors import EngineUnavailable

if TYPE_CHECKING:
    from serve_app.engines.lmdeploy.workers.worker import GroupWorker

_STEP_S = 0.01


@dataclass(frozen=True, slots=True)
class Output:
    """What LMDeploy sampled since the last one.

    With the last one come ``status`` and the rows: an array, or the key of one.
    """

    token_ids: list[int]
    logprobs: list[float]
    status: ResponseType
    rows: npt.NDArray[Any] | list[Any] | str | None = None
    cached_tokens: int = 0


class Backend:
    """One engine on one event loop, and as many instances as requests that run at once."""

    def __init__(
        self,
        model: str,
        config: PytorchEngineConfig,
        options: LmdeployOptions,
        seat: Seat,
        worker: "type[GroupWorker] | None" = None,
    ) -> None:
        self._options = options
        self._workers = config.distributed_executor_backend == "ray"
        if self._workers:
            from serve_app.engines.lmdeploy.workers.executor import sit

            sit(seat, options.start_timeout_s, options.liveness_timeout_s, worker)
        adapt(config.enable_return_routed_experts)
        get_logger("lmdeploy").setLevel(logging.WARNING)  # INFO is a line a request and step
        try:
            self.engine = Engine(model, config)
        except SystemExit as gone:  # its check of the machine ends the process
            raise ValueError(f"LMDeploy cannot run {model} here; its log says why") from gone
        if config.enable_transfer_obj_ref:
            # Its instances put into shared_store only if the executor was named so; they may.
            self.engine.engine_config.distributed_executor_backend = "ray"
        if not self._workers:
            adapt_agent(self.engine.executor.model_agent)
        self._sequences = keep_rows(self.engine)
        self._control = self.engine.create_instance()
        self._instances = [self.engine.create_instance() for _ in range(config.max_batch_size)]
        self._sessions = itertools.count()
        self._progress = (-1, time.monotonic())

    @property
    def context_length(self) -> int:
        """How long a sequence can be with the blocks there are."""
        return int(self.engine.max_session_len)

    @property
    def free(self) -> int:
        """How many more requests can run at once."""
        return len(self._instances)

    @property
    def padding(self) -> int:
        """The token that fills up rows of ids for logits processors."""
        return int(self.engine.sampling_strategy.pad_token_id)

    def start(self, failed: Callable[[str], None]) -> None:
        """Begin to serve on the running loop; call ``failed`` there once a worker is lost."""
        self.engine.start_loop()
        if self._workers:
            tell = asyncio.get_running_loop().call_soon_threadsafe
            self.engine.executor.watch.when_failed(lambda why: tell(failed, why))

    @property
    def workers(self) -> list[Any]:
        """The actors that hold the model, in the order of their ranks; none where it is here."""
        return list(self.engine.executor.workers) if self._workers else []

    def open_session(self) -> int:
        """Return the number of a session that is about to run."""
        return next(self._sessions)

    async def run(
        self, session: int, prompt: Sequence[int], config: GenerationConfig
    ) -> AsyncGenerator[Output, None]:
        """Sample one request in a session of its own, to its end or until `cancel`."""
        instance = self._instances.pop()
        try:
            infer = instance.async_stream_infer(session, list(prompt), config)
            async with aclosing(infer) as outputs:
                async for out in outputs:
                    yield Output(
                        out.token_ids,
                        _logprobs(out.token_ids, out.logprobs),
                        out.status,
                        out.routed_experts,
                        out.req_metrics.cached_tokens if out.req_metrics else 0,
                    )
        finally:
            self._instances.append(instance)

    def recomputed(self, session: int) -> int:
        """Forget an ended session; return how often it lost its blocks and began anew."""
        return self._sequences.forget(session)

    async def cancel(self, session: int) -> None:
        """End a session that runs; its last output follows, with status ``CANCEL``."""
        await self._control.async_cancel(session)

    def check_health(self, working: bool) -> None:
        """Raise `EngineUnavailable` where the engine has ended, or works and does not move."""
        status = self.engine.get_local_health_status()
        if not status["alive"]:
            raise EngineUnavailable(f"LMDeploy's engine is dead: {status['message']}")
        tick, now = self.engine.scheduler.scheduler_tick, time.monotonic()
        if not working or tick != self._progress[0]:
            self._progress = (tick, now)
        elif (stuck := now - self._progress[1]) > self._options.step_timeout_s:
            raise EngineUnavailable(f"LMDeploy's engine is stuck: no progress for {stuck:.1f} s")

    async def sleep(self, level: int) -> None:
        """Take weights and cache off the device; or forget the weights of one that sleeps."""
        if self.engine._sleeping_tags and self._workers:
            from serve_app.engines.lmdeploy.workers.loading import forget_weights

            # Its own way waits for ranks that step, and those that sleep do not.
            await asyncio.to_thread(self.engine.executor.each, forget_weights)
            return
        await self.engine.sleep(level)
        self.flush_prefixes()

    async def wake(self, tags: list[str]) -> None:
        """Take them back; after level 2 the weights are still to be loaded."""
        engine = self.engine
        await asyncio.to_thread(engine.executor.wakeup, tags)
        engine._sleeping_tags.difference_update(tags)
        if not engine._sleeping_tags:
            engine.wakeup([])  # its events belong to this loop

    def load(self, buckets: Iterable[list[tuple[str, Any]]]) -> None:
        """Load weights in the checkpoint's names; nothing may run. Blocks."""
        if self._workers:
            from serve_app.engines.lmdeploy.workers.loading import load_bucket, packed_buckets

            for packed, last in packed_buckets(buckets):
                self.engine.executor.each(load_bucket, packed, last)
            return
        agent = self.engine.executor.model_agent
        with torch.inference_mode(), agent.all_context():
            for bucket in buckets:
                agent._load_updated_weight_bucket(bucket, "update_weights")
            agent._finalize_updated_weights()

    async def settle(self) -> None:
        """Wait until no forward pass is under way, once nothing runs any more.

        LMDeploy sends the next step before it has seen the last one's tokens.
        """
        while self.engine.scheduler.has_unfinished() or not self._waits():  # noqa: ASYNC110
            await asyncio.sleep(_STEP_S)

    def flush_prefixes(self) -> None:
        """Forget all cached prefixes: they are of other weights, or their cache is gone.

        LMDeploy 0.18 does not do so itself. Nothing may be running.
        """
        scheduler = self.engine.scheduler
        trie = scheduler.block_trie
        while trie.evict(scheduler.block_manager.num_gpu_blocks):
            pass
        if trie.leaves:
            raise EngineUnavailable(
                f"LMDeploy's prefix cache could not be flushed: {len(trie.leaves)} blocks are held"
            )

    async def stop(self) -> None:
        """End the engine's tasks and free the model. It never ends Ray."""
        self._instances.clear()
        loop_task = self.engine.req_manager._loop_task
        self.engine.stop()
        if loop_task is not None:
            await asyncio.wait([loop_task])
        self.engine.req_manager.stop_loop()
        await asyncio.sleep(0)

    def _waits(self) -> bool:
        """Whether the main loop waits for work, which nothing public tells."""
        loop = self.engine._engine_loop
        return loop is None or bool(loop.has_runable_event.event._waiters)


def _logprobs(token_ids: Sequence[int], found: Sequence[dict[int, float]] | None) -> list[float]:
    if not token_ids:
        return []
    assert found is not None
    return [one[token] for token, one in zip(token_ids, found, strict=True)]
