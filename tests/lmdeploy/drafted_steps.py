"""LMDeploy's own bookkeeping of sequences, step by step, with a model made of arithmetic.

Scheduler, block manager, prefix cache, inputs, sequences, stopping and answers are LMDeploy's; the
model agent is constructed: `Device` knows each sequence's tokens as a GPU would, and what it drafts
is right as often as a test says; without drafts it samples token by token. A row is
``[[pass, position], [token, 0]]``: in which forward pass it was captured, and for which token.
"""

# mypy: ignore-errors
# (It is made of LMDeploy's untyped parts.)

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from lmdeploy.messages import ResponseType
from lmdeploy.pytorch.config import CacheConfig, SchedulerConfig
from lmdeploy.pytorch.disagg.config import EngineRole
from lmdeploy.pytorch.engine.engine_loop import EngineLoop, EngineLoopConfig
from lmdeploy.pytorch.engine.inputs_maker import InputsMakerAsync, InputsMakerConfig
from lmdeploy.pytorch.engine.model_agent.agent import BatchedOutputs
from lmdeploy.pytorch.messages import SamplingParam, SequenceMeta
from lmdeploy.pytorch.paging import Scheduler
from lmdeploy.pytorch.strategies.ar import ARStrategyFactory
from lmdeploy.pytorch.strategies.ar_spec import ARSpecStrategyFactory
from lmdeploy.pytorch.strategies.ar_spec.model_agent import (
    ARSpecExtraInputs,
    ARSpecExtraOutputs,
    ARSpecStoppingCriteria,
)

BLOCK = 4


def next_token(tokens):
    """What the model samples after ``tokens``."""
    return 100 + crc32(bytes(str(list(tokens)), "ascii")) % 60_000


def continued(tokens: list[int], count: int) -> list[int]:
    """``tokens`` and so many that the model samples after them."""
    out = list(tokens)
    for _ in range(count):
        out.append(next_token(out))
    return out


@dataclass
class Device:
    """Runs forward passes over what LMDeploy sends.

    ``right`` of ``drafts`` drafts are right, in each step as many as it says in turn.
    """

    drafts_a_step: int
    right: list[int]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    drafts: dict[int, list[int]] = field(default_factory=dict)
    passes: int = 0

    def forward(self, running, inputs, delta):
        """Return LMDeploy's output of one step, and remember what it sampled."""
        self.passes += 1
        if inputs is not None:
            return self._prefill(running, inputs)
        assert delta.max_q_seqlen == self.drafts_a_step + 1
        sampled, rows = [], []
        for sequence in running:
            tokens, drafts = self.tokens[sequence.session_id], self.drafts[sequence.session_id]
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == next_token(
                tokens + drafts[:accepted]
            ):
                accepted += 1
            rows.append(self._rows([tokens[-1], *drafts], len(tokens) - 1))
            new = [*drafts[:accepted], next_token(tokens + drafts[:accepted])]
            sampled.append(new + [-1] * (len(drafts) - accepted))
        return self._outputs(running, torch.tensor(sampled), torch.cat(rows))

    def _prefill(self, running, inputs):
        rows, sampled, start = [], [], 0
        flat, lengths = inputs.input_ids.flatten().tolist(), inputs.seq_length.tolist()
        for sequence, length, before in zip(
            running, lengths, inputs.history_lengths.tolist(), strict=True
        ):
            here = flat[start : start + length]
            start += length
            session = sequence.session_id
            cached = sequence.history_cache.get_real()[:before].tolist()
            self.tokens[session] = [*cached, *here]
            rows.append(self._rows(here, before))
            sampled.append([next_token(self.tokens[session])])
        if inputs.is_chunk and not inputs.is_last_chunk:
            return BatchedOutputs(
                next_token_ids=torch.zeros(1, 1, dtype=torch.long),
                stopped=torch.zeros(1, dtype=torch.bool),
                stop_pos=torch.full((1,), -1),
                all_routed_experts=torch.cat(rows),
            )
        return self._outputs(running, torch.tensor(sampled), torch.cat(rows))

    def _outputs(self, running, sampled, rows):
        rejected = (sampled < 0).sum(-1)
        done = [
            sequence.sampling_param.max_new_tokens
            - (len(self.tokens[sequence.session_id]) - sequence.prompt)
            for sequence in running
        ]
        words = [sequence.sampling_param.stop_words or [-1] for sequence in running]
        extra = ARSpecExtraInputs(output_token_ids=sampled, num_rejected_tokens=rejected)
        stopped, stop_pos, _ = ARSpecStoppingCriteria(torch.tensor(done)).step(
            sampled[:, 0], torch.tensor(words), extra_inputs=extra
        )
        drafts = []
        for sequence, row in zip(running, sampled.tolist(), strict=True):
            session = sequence.session_id
            self.tokens[session] += [token for token in row if token >= 0]
            drafts.append(self._draft(self.tokens[session]))
            self.drafts[session] = drafts[-1]
        drafted = ARSpecExtraOutputs(draft_token_ids=torch.tensor(drafts))
        return BatchedOutputs(
            next_token_ids=sampled if self.drafts_a_step else sampled.flatten(),
            stopped=stopped,
            stop_pos=stop_pos,
            extra_outputs=drafted if self.drafts_a_step else None,
            all_routed_experts=rows,
        )

    def _draft(self, tokens):
        right = self.right[self.passes % len(self.right)]
        drafts = continued(tokens, self.drafts_a_step)[len(tokens) :]
        return [token + (number >= right) for number, token in enumerate(drafts)]

    def _rows(self, tokens, start):
        rows = torch.zeros(len(tokens), 2, 2, dtype=torch.int64)
        rows[:, 0, 0] = self.passes
        rows[:, 0, 1] = torch.arange(start, start + len(tokens))
        rows[:, 1, 0] = torch.tensor(tokens)
        return rows.to(torch.uint16)


class Loop:
    """LMDeploy's loop without its tasks: a step is `send`, then `receive`."""

    def __init__(
        self,
        keep: Any,
        right: list[int],
        drafts: int = 3,
        blocks: int = 64,
        prefix_caching: bool = False,
        chunk: int = 512,
        block: int = BLOCK,
        batch: int = 8,
    ) -> None:
        model = SimpleNamespace(bos_token_id=0)
        spec = SimpleNamespace(num_speculative_tokens=drafts, method="deepseek_mtp")
        factory = ARSpecStrategyFactory(model, spec) if drafts else ARStrategyFactory(model)
        scheduling = SchedulerConfig(max_batches=batch, max_session_len=1 << 16, prefill_interval=1)
        cache = CacheConfig(
            max_batches=batch,
            block_size=block,
            num_cpu_blocks=0,
            num_gpu_blocks=blocks,
            max_prefill_token_num=chunk,
            enable_prefix_caching=prefix_caching,
        )
        self.device = Device(drafts, right)
        self.seq_strategy = factory.build_sequence_strategy()
        self.seq_meta = SequenceMeta(block, strategy=self.seq_strategy)
        self.scheduler = Scheduler(scheduling, cache, self.seq_meta)
        self.kept = keep(self)
        self.maker = InputsMakerAsync(
            executor=SimpleNamespace(device_type="cpu"),
            scheduler=self.scheduler,
            state_checkpoints=self.scheduler.state_checkpoints,
            adapter_manager=SimpleNamespace(num_adapters=lambda: 1),
            engine_strategy=factory.build_engine_strategy(cache, scheduling),
            sampling_strategy=factory.build_sampling_strategy(),
            model_agent_strategy=factory.build_model_agent_strategy(),
            config=InputsMakerConfig(
                max_batches=batch,
                max_prefill_token_num=chunk,
                role=EngineRole.Hybrid,
                block_size=block,
                kernel_block_size=block,
                window_size=-1,
                enable_prefix_caching=prefix_caching,
                prefix_cache_decode_state_interval=0,
                spec_decoding=drafts > 0,
            ),
        )
        self.loop = EngineLoop(
            req_manager=None,
            scheduler=self.scheduler,
            state_checkpoints=self.scheduler.state_checkpoints,
            executor=None,
            seq_strategy=self.seq_strategy,
            inputs_maker=self.maker,
            config=EngineLoopConfig(EngineRole.Hybrid, num_speculative_tokens=drafts or None),
        )
        self.answers = {}

    def add(self, session, prompt, new, stop=(), records=True):
        self.scheduler.add_session(session)
        sequence = self.scheduler.sessions[session].add_sequence(
            np.array(prompt),
            SamplingParam(
                max_new_tokens=new,
                stop_words=list(stop),
                return_routed_experts=records,
                random_seed=1,
            ),
        )
        sequence.prompt = len(prompt)
        sequence.resp = SimpleNamespace(
            type=ResponseType.SUCCESS, data=None, is_done=False, _input_logprobs=None
        )
        return sequence

    def send(self, prefill):
        """Make a step's inputs, as the loop does before it has seen the last one's output."""
        found = self.maker._make_forward_inputs(prefill)
        running, inputs, delta = (found[name] for name in ("running", "inputs", "delta"))
        self.scheduler.activate_seqs(running)
        self.maker.update_running_seqs(running, inputs)
        return running, inputs, delta

    def receive(self, sent):
        """Let the device run it and LMDeploy note what came out."""
        running, inputs, delta = sent
        output = self.device.forward(running, inputs, delta)
        for session, answer in self.loop._make_infer_outputs(
            output, running, inputs, delta
        ).items():
            self.answers[session] = answer
        self.maker.preempt_invalid_decode_seqs()

    def run(self, ahead=False):
        """Run to the end of all sequences, prefills first.

        ``ahead``: each step is sent before the one before it was received, as LMDeploy does.
        """
        under_way = None
        for _ in range(400):
            prefill = self.scheduler.has_waiting() or self.maker.has_pending_long_context_chunk()
            self.maker.running_seqs = [
                one for one in self.maker.running_seqs if one.status.name != "STOPPED"
            ]
            sent = self.send(prefill) if prefill or self.maker.running_seqs else ((), None, None)
            if not sent[0] and under_way is None:
                if self.scheduler.has_unfinished():
                    continue
                return
            if under_way is not None:
                self.receive(under_way)
            under_way = sent if sent[0] else None
            if under_way is not None and not ahead:
                self.receive(under_way)
                under_way = None
        raise AssertionError("it does not end")
