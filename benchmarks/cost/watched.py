"""The real LMDeploy engine, recording in LMDeploy's own way or in ours: what a step of it runs."""

# mypy: ignore-errors
# (It reaches into LMDeploy's untyped parts.)

import asyncio
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve_app.config import EngineArgs
from serve_app.deployments.rollout.loading import load_engine
from serve_app.types import GenerateRequest

NO_KERNEL = {
    *("slice", "select", "view", "_unsafe_view", "unsqueeze", "squeeze", "t", "transpose"),
    *("permute", "expand", "as_strided", "alias", "detach", "split", "split_with_sizes"),
    *("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "reshape"),
}


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Watched:
    """An engine of one mode whose decode steps are counted."""

    def __init__(self, model: Path, records: bool, asks: bool) -> None:
        self._asks = asks
        self._engine = load_engine(
            EngineArgs(
                backend="lmdeploy",
                model=str(model),
                dtype="float16",
                max_batch_size=8,
                enable_return_routed_experts=records,
                engine_kwargs={
                    "eager_mode": True,
                    "num_gpu_blocks": 100,
                    "block_size": 16,
                    "max_prefill_token_num": 512,
                },
            )
        )
        self.operators, self.copies, self.steps = Counter(), Counter(), 0
        self._agent = self._engine._backend.engine.executor.model_agent
        forward = self._agent._forward_impl

        def counted(inputs, **rest):
            if not inputs.is_decoding:
                return forward(inputs, **rest)
            with Operators() as operators:
                output = forward(inputs, **rest)
            self.operators += operators.found
            self.steps += 1
            return output

        self._agent._forward_impl = counted

    async def run(self, prompts, new):
        """Sample all prompts at once; return their routes."""
        outputs, push = 0, self._agent._push_output

        def counting(output):
            nonlocal outputs
            outputs += 1
            push(output)

        self._agent._push_output = counting
        with host_copies() as copies:
            records = await asyncio.gather(*(self._sample(prompt, new) for prompt in prompts))
        self._agent._push_output = push
        for name, count in copies.items():
            self.copies[name] += count / outputs
        await self._engine.stop()
        return records

    async def _sample(self, prompt, new):
        request = GenerateRequest(
            input_ids=prompt,
            max_new_tokens=new,
            temperature=0.0,
            ignore_eos=True,
            return_routed_experts=self._asks,
        )
        chunks = [chunk async for chunk in self._engine.generate(request)]
        assert chunks[-1].error is None, chunks[-1].error
        record = chunks[-1].record
        return None if record is None else record.ids

    def per_step(self):
        """Return operators and copies of one step."""
        return {name: count / self.steps for name, count in self.operators.items()}


@contextmanager
def lmdeploys_own_way():
    """Let engines that are built meanwhile record without what we change."""
    from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent

    from serve_app.engines.lmdeploy import adapting, backend, layers

    ours = (adapting.gather_when_built, adapting._queue_routes, backend.keep_rows)
    adapting.gather_when_built = lambda: None
    adapting._queue_routes = lambda agent: None
    backend.keep_rows = lambda engine: SimpleNamespace(forget=lambda session: 0)
    BaseModelAgent._build_model = layers._build_model
    try:
        yield
    finally:
        adapting.gather_when_built, adapting._queue_routes, backend.keep_rows = ours


@contextmanager
def host_copies():
    """Count tensors that are copied to the host: waited for one by one, or queued behind a step."""
    found, queued = Counter(), []
    real_cpu, real_to = torch.Tensor.cpu, torch.Tensor.to

    def cpu(self, *args, **kwargs):
        found["waited_for"] += not any(self is one for one in queued)
        return real_cpu(self, *args, **kwargs)

    def to(self, *args, **kwargs):
        moved = real_to(self, *args, **kwargs)
        if args[:1] == ("cpu",) and kwargs.get("non_blocking"):
            found["queued"] += 1
            queued.append(moved)
            del queued[:-8]
        return moved

    torch.Tensor.cpu, torch.Tensor.to = cpu, to
    try:
        yield found
    finally:
        torch.Tensor.cpu, torch.Tensor.to = real_cpu, real_to
