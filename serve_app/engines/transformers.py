"""The Transformers engine: Hugging Face MoE models on the CPU, behind the `Engine` Protocol."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from serve_app.config import EngineArgs
from serve_app.engines.base import EngineChunk, ModelInfo
from serve_app.engines.checkpoint import load_checkpoint
from serve_app.engines.expert_rows import ExpertRows
from serve_app.engines.recording import ExpertRecorder
from serve_app.engines.rollout import Rollout, StopRules
from serve_app.engines.runner import ModelRunner
from serve_app.engines.sampling import SEED_RANGE
from serve_app.engines.steps import StepThread
from serve_app.engines.stream import ChunkStream
from serve_app.engines.weights import WeightSpec
from serve_app.errors import EngineUnavailable, InvalidRequest
from serve_app.types import GenerateRequest, UpdateMode

if TYPE_CHECKING:
    import torch

FIRST_NEW_ROWS = 64


class TransformersEngine:
    """Loads a checkpoint and serves it from a thread of its own.

    Raises ValueError for arguments that the checkpoint or this engine cannot meet, such as
    recording the routed experts of a dense model.
    """

    def __init__(self, args: EngineArgs) -> None:
        checkpoint = load_checkpoint(args)
        recorder = None
        if args.enable_return_routed_experts:
            recorder = ExpertRecorder(checkpoint.blocks)
        self._info = checkpoint.info
        self._records = recorder is not None
        self._eos_ids = checkpoint.eos_ids
        self._decode = checkpoint.decode
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
    def info(self) -> ModelInfo:
        """The served model."""
        return self._info

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next forward pass uses; 0 as loaded."""
        return self._steps.weight_version

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a request that this model can never serve."""
        prompt, info = request.input_ids, self._info
        if not prompt:
            raise InvalidRequest("expected at least one prompt token, got none")
        self._check_vocabulary("input_ids", (min(prompt), max(prompt)))
        self._check_vocabulary("stop_token_ids", request.stop_token_ids)
        self._check_vocabulary("logit_bias", request.logit_bias)
        if len(prompt) >= info.context_length:
            raise InvalidRequest(
                f"expected at most {info.context_length - 1} prompt tokens, one less than the"
                f" context length {info.context_length}, got {len(prompt)}"
            )
        if request.stop and self._decode is None:
            raise InvalidRequest(
                "stop strings need the checkpoint's tokenizer, and it has none; use stop_token_ids"
            )
        if "" in request.stop:
            raise InvalidRequest("expected stop strings that are not empty, got ''")
        if request.seed is not None and request.seed not in SEED_RANGE:
            raise InvalidRequest(
                f"expected a seed in [{SEED_RANGE.start}, {SEED_RANGE.stop}), got {request.seed}"
            )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineChunk, None]:
        """Sample one rollout; see `Engine`. Raises when the iteration begins."""
        self.check(request)
        stream = ChunkStream()
        rollout = self._rollout(request, stream)
        self._steps.submit(rollout)
        finished = False
        try:
            while not finished:
                chunk = await stream.get()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                self._steps.abandon(rollout)

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
        self._weights.check(taken)
        await asyncio.wrap_future(self._steps.update(taken, version, mode))

    def check_health(self) -> None:
        """Raise `EngineUnavailable` once the step loop has ended, and say why."""
        if self._steps.ended is not None:
            raise EngineUnavailable(self._steps.ended)

    async def stop(self) -> None:
        """Abort everything, end the thread and free the model. Idempotent."""
        self._steps.stop()
        await asyncio.wrap_future(self._steps.finished)
        self._steps.join()

    def _check_vocabulary(self, what: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequest(
                    f"expected {what} in [0, {self._info.vocab_size}), got {token}"
                )

    def _rollout(self, request: GenerateRequest, stream: ChunkStream) -> Rollout:
        eos_ids = frozenset() if request.ignore_eos else self._eos_ids
        room = self._info.context_length - len(request.input_ids)
        rules = StopRules(
            token_ids=eos_ids.union(request.stop_token_ids),
            strings=request.stop,
            include_token=request.include_stop_token,
            max_new_tokens=min(request.max_new_tokens, room),
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
        return Rollout(request, rules, experts, stream)
