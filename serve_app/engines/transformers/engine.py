"""The Transformers engine: Hugging Face MoE models on the CPU, behind the `Engine` Protocol."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from serve_app.config import EngineArgs
from serve_app.engines.answering import AnsweringEngine
from serve_app.engines.stream import ChunkStream
from serve_app.engines.transformers.checkpoint import load_checkpoint, load_model
from serve_app.engines.transformers.expert_rows import ExpertRows
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.engines.transformers.rollout import Rollout, StopRules
from serve_app.engines.transformers.runner import ModelRunner
from serve_app.engines.transformers.steps import StepThread
from serve_app.engines.weight_spec import WeightSpec
from serve_app.errors import EngineUnavailable
from serve_app.types import GenerateRequest, SleepLevel, UpdateMode

if TYPE_CHECKING:
    import torch

FIRST_NEW_ROWS = 64


class TransformersEngine(AnsweringEngine[Rollout]):
    """Loads a checkpoint and serves it from a thread of its own.

    Raises ValueError for arguments that the checkpoint or this engine cannot meet, such as
    recording the routed experts of a dense model.
    """

    def __init__(self, args: EngineArgs) -> None:
        checkpoint = load_checkpoint(args)
        super().__init__(args, checkpoint.info, has_tokenizer=checkpoint.decode is not None)
        self._options = checkpoint.options
        recorder = None
        if args.enable_return_routed_experts:
            recorder = ExpertRecorder(checkpoint.blocks)
        self._records = recorder is not None
        self._eos_ids = checkpoint.eos_ids
        self._decode = checkpoint.decode
        self._sleeping = asyncio.Lock()
        self._weights = WeightSpec(checkpoint.model)
        runner = ModelRunner(checkpoint.model, recorder)
        try:
            runner.rehearse()
        except Exception as failure:
            raise ValueError(
                f"{checkpoint.info.family}: this engine cannot run it: {failure}"
            ) from failure
        self._steps = StepThread(
            runner,
            max_batch_size=args.max_batch_size,
            max_waiting=args.max_waiting,
            num_threads=checkpoint.options.num_threads,
        )

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses; 0 as loaded."""
        return self._steps.weight_version

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; when this returns their slots are free."""
        with suppress(EngineUnavailable):
            return await asyncio.wrap_future(self._steps.abort(request_id))
        return 0

    async def update_weights(
        self, state: "Mapping[str, torch.Tensor]", version: int, mode: UpdateMode
    ) -> None:
        """Serve ``state`` from now on; see `Engine`. What waits is served by the new weights."""
        taken = dict(state)  # once: what was checked is what will be loaded
        self._weights.check_state(taken)
        await asyncio.wrap_future(self._steps.update(taken, version, mode))

    async def sleep(self, level: SleepLevel) -> None:
        """Abort everything and take the weights out of the model; see `Engine`.

        Level 1 keeps them in memory beside a model on a GPU; on a CPU only level 2 frees any.
        """
        async with self._sleeping:
            await asyncio.wrap_future(self._steps.sleep(keep=level == 1))
            self._sleep_level = (
                level if self._sleep_level is None else max(self._sleep_level, level)
            )

    async def wake(
        self, state: "Mapping[str, torch.Tensor] | None" = None, version: int = 0
    ) -> None:
        """Serve again; see `Engine`. Nothing happens where it serves already."""
        async with self._sleeping:
            if self._sleep_level is None:
                return
            if self._sleep_level == 2 and state is None:
                model = await asyncio.to_thread(load_model, self._args, self._options)
                state, version = model.state_dict(), 0
            taken = None if state is None else dict(state)
            if taken is not None:
                self._weights.check_state(taken)
            await asyncio.wrap_future(self._steps.wake(taken, version))
            self._sleep_level = None

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once the step loop has ended or is stuck, and say why."""
        if self._steps.ended is not None:
            raise EngineUnavailable(self._steps.ended)
        if (stuck := self._steps.stuck_s) > self._options.step_timeout_s:
            raise EngineUnavailable(
                f"the engine's step loop is stuck: no progress for {stuck:.1f} s"
            )

    async def stop(self) -> None:
        """Abort everything, end the thread and free the model. Idempotent."""
        self._steps.stop()
        await asyncio.wrap_future(self._steps.finished)
        self._steps.join()

    def _submit(
        self, requests: Sequence[GenerateRequest], filled: asyncio.Event, group: str | None
    ) -> list[Rollout]:
        rollouts = [self._rollout(one, ChunkStream(filled), group) for one in requests]
        self._steps.submit(rollouts)
        return rollouts

    def _abandon(self, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            self._steps.abandon(rollout)

    def _rollout(self, request: GenerateRequest, stream: ChunkStream, group: str | None) -> Rollout:
        eos_ids = frozenset() if request.ignore_eos else self._eos_ids
        rules = StopRules(
            token_ids=eos_ids.union(request.stop_token_ids),
            strings=request.stop,
            include_token=request.include_stop_token,
            max_new_tokens=self._rules.most_new_tokens(request),
            min_new_tokens=request.min_new_tokens,
            decode=self._decode,
        )
        experts = None
        if self._records and request.return_routed_experts:
            experts = ExpertRows(
                layers=self._info.layers,
                moe_layers=self._info.moe_layers,
                top_k=self._info.top_k,
                num_experts=self._info.num_experts,
                capacity=len(request.input_ids) + min(rules.max_new_tokens, FIRST_NEW_ROWS) - 1,
            )
        return Rollout(request, rules, experts, stream, group)
