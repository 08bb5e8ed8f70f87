"""LMDeploy's own loop over sequences, with a model that takes no time: what its Python takes.

Scheduler, inputs, sequences, prefix cache and answers are LMDeploy's
(`tests.lmdeploy.drafted_steps`); a step's output is made of nothing. Rollouts are of even lengths
and begin and end one after another, so that a step is like any other.
"""

# mypy: ignore-errors
# (It is made of LMDeploy's untyped parts.)

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lmdeploy.pytorch.engine.model_agent.agent import BatchedOutputs

from tests.lmdeploy.drafted_steps import Loop

ROUTES = (48, 8)


@dataclass
class Idle:
    """Stands for the model agent: one token a sequence, and the rows of all tokens."""

    records: bool
    rows: torch.Tensor = field(
        default_factory=lambda: torch.randint(0, 128, (1 << 14, *ROUTES)).to(torch.uint16)
    )

    def forward(self, running, inputs, delta):
        count = len(running)
        tokens = count if inputs is None else int(inputs.seq_length.sum())
        left = [one.sampling_param.max_new_tokens - one.num_new_tokens for one in running]
        return BatchedOutputs(
            next_token_ids=torch.full((count,), 7),
            stopped=torch.tensor(left) <= 1,
            stop_pos=torch.zeros(count, dtype=torch.long),
            all_routed_experts=self.rows[:tokens].clone() if self.records else None,
        )


class Steady:
    """A loop with ``count`` rollouts in it at all times; one that ends makes room for another."""

    def __init__(
        self,
        keep: Any,
        count: int,
        prompt: int,
        new: int,
        prefix_caching: bool,
        records: bool = True,
    ) -> None:
        blocks = 2 * count * (prompt + new) // 64 + count
        self.loop = Loop(keep, [0], 0, blocks, prefix_caching, chunk=1 << 14, block=64, batch=count)
        self.loop.device = Idle(records)
        self._records, self._prompt, self._new = records, prompt, new
        self._sessions = itertools.count()
        self._prompts = np.random.default_rng(0)
        self.taken = []
        for number in range(count):
            self._add(1 + new * (number + 1) // count)
        while self.loop.scheduler.has_waiting():
            self.step()

    def step(self):
        """Run one decode step, and the prefill of whoever is new; return the CPU seconds."""
        took = 0.0
        if self.loop.scheduler.has_waiting():
            took += self._run(prefill=True)
        took += self._run(prefill=False)
        for session, scheduled in list(self.loop.scheduler.sessions.items()):
            if next(iter(scheduled.sequences.values())).status.name == "STOPPED":
                self.taken.append(self.loop.answers.pop(session).routed_experts)
                begun = time.thread_time()
                self.loop.scheduler.end_session(session)
                took += time.thread_time() - begun
                if self._records and self.loop.kept is not None:
                    self.loop.kept.forget(session)
                self._add(self._new)
        del self.taken[:-1]
        return took

    def _run(self, prefill):
        begun = time.thread_time()
        running, inputs, delta = self.loop.send(prefill)
        took = time.thread_time() - begun
        output = self.loop.device.forward(running, inputs, delta)
        begun = time.thread_time()
        self.loop.answers |= self.loop.loop._make_infer_outputs(output, running, inputs, delta)
        self.loop.maker.preempt_invalid_decode_seqs()
        return took + time.thread_time() - begun

    def _add(self, new):
        prompt = self._prompts.integers(3, 500, self._prompt)
        self.loop.add(next(self._sessions), prompt, new, records=self._records)
