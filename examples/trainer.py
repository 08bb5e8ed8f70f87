"""The demo's trainer: an actor that samples from the served graph and learns with GRPO in fp32.

A step reads its rollouts three times: without replay (only to show the gap), with replay for the
old log-probabilities, and with replay for the update. The routes are materialized once.
"""

import base64
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.packing import Pack, Rollout, packs
from examples.report import Gap, Rows, StepReport
from serve_app.client import RoutedExpertsClient
from serve_app.engines.moe import find_moe_blocks
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.replay import Trace, replay_routing
from serve_app.types import ExpertBatch, GenerateRequest, GenerateResult, RoutedSequence

CLIP = 0.2


@dataclass(frozen=True, slots=True)
class TrainerArgs:
    """What the trainer learns from; ``pack`` rollouts share one row of a forward pass."""

    app: str
    model: Path
    prompts: tuple[str, ...]
    group: int
    new_tokens: int
    pack: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Forward:
    """A pass over one pack: log-probabilities ``[sampled]`` and the ids that experts received.

    ``received`` is ``[tokens, moe_layers, top_k]``.
    """

    logprobs: torch.Tensor
    received: torch.Tensor


class Trainer:
    """Holds the fp32 model; `steps` does everything."""

    def __init__(self, args: TrainerArgs) -> None:
        self._args = args
        self._model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        blocks = find_moe_blocks(self._model)
        if not blocks:
            raise ValueError(f"{args.model} has no MoE layers, so there are no routes to replay")
        self._recorder = ExpertRecorder(blocks)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=args.learning_rate)
        self._client = RoutedExpertsClient(args.app)
        self._prompts = _tokenize(args.model, args.prompts)

    def steps(self, count: int) -> Iterator[str | StepReport]:
        """Run steps; yield what is being done now, and each step's report at its end."""
        for number in range(1, count + 1):
            yield from self._step(number)

    def _step(self, number: int) -> Iterator[str | StepReport]:
        tag = f"step-{number}"
        yield f"sampling {len(self._prompts) * self._args.group} rollouts"
        rollouts = self._sample(tag, number - 1)
        begun = time.perf_counter()
        batch = self._materialize(rollouts)
        materialize_s = time.perf_counter() - begun
        rows = list(packs(rollouts, batch, self._args.pack))
        yield "reading them with replay, for the old log-probabilities"
        with torch.no_grad():
            old = [self._forward(pack, replay=True) for pack in rows]
        yield "reading them without replay, to show the gap"
        with torch.no_grad():
            native = [self._forward(pack, replay=False) for pack in rows]
        yield "learning with replay"
        with tempfile.TemporaryDirectory() as folder:
            trace = self._trace(Path(folder) / "replay.jsonl", rollouts[: self._args.pack])
            learned = self._learn(rows, old, trace)
            verdict = trace.verdict()
        # Only now: until the optimizer has stepped, a pass that failed could be repeated.
        self._client.release(tag=tag)
        yield "pushing the weights"
        self._client.update_weights(self._model.state_dict(), version=number)
        by_json, by_base64 = _sizes(batch)
        yield StepReport(
            step=number,
            reward=statistics.fmean(rollout.reward for rollout in rollouts),
            tokens=len(batch.ids),
            sampled=sum(len(rollout.output_ids) for rollout in rollouts),
            key_bytes=sum(len(rollout.key) for rollout in rollouts),
            base64_bytes=by_base64,
            json_bytes=by_json,
            without=_gap(rows, native, native),
            replayed=_gap(rows, old, learned),
            materialize_s=materialize_s,
            live_keys=self._client.stats().live_keys,
            rows=rows_of(batch),
            replay_happened=verdict.happened,
            verdict=verdict.says,
        )

    def _sample(self, tag: str, version: int) -> list[Rollout]:
        prompts = [prompt for prompt in self._prompts for _ in range(self._args.group)]
        results = self._client.generate_batch(
            [
                GenerateRequest(
                    input_ids=prompt,
                    max_new_tokens=self._args.new_tokens,
                    seed=version * len(prompts) + index,
                    return_routed_experts=True,
                    tag=tag,
                )
                for index, prompt in enumerate(prompts)
            ]
        )
        rewards = [_reward(result) for result in results]
        advantages = _group_advantages(rewards, self._args.group)
        return [
            _rollout(*sampled, version)
            for sampled in zip(prompts, results, rewards, advantages, strict=True)
        ]

    def _materialize(self, rollouts: Sequence[Rollout]) -> ExpertBatch:
        return self._client.materialize(_sequences(rollouts), tracks=["tokens"])

    def _trace(self, path: Path, rollouts: Sequence[Rollout]) -> Trace:
        """Write down what was recorded, sliced and used for the last of some rollouts."""
        sequences = _sequences(rollouts)
        return Trace(path, [len(sequences) - 1], of=sequences, get=self._client.get)

    def _forward(self, pack: Pack, *, replay: bool, trace: Trace | None = None) -> Forward:
        routing: AbstractContextManager[None] = (
            replay_routing(self._model, pack.routes, trace=trace) if replay else nullcontext()
        )
        with routing, self._recorder.capture() as captured:
            logits = self._model(
                input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False
            ).logits[0, pack.predicting]
        logprobs = logits.log_softmax(-1).gather(-1, pack.sampled[:, None])[:, 0]
        return Forward(logprobs, torch.from_numpy(captured.ids()))

    def _learn(self, rows: Sequence[Pack], old: Sequence[Forward], trace: Trace) -> list[Forward]:
        """Take one optimizer step on the clipped GRPO loss; return the passes it learned from.

        The first of them is traced.
        """
        sampled = sum(len(pack.sampled) for pack in rows)
        passes = list[Forward]()
        for pack, before in zip(rows, old, strict=True):
            now = self._forward(pack, replay=True, trace=None if passes else trace)
            ratio = (now.logprobs - before.logprobs).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * pack.advantages, clipped * pack.advantages)
            (-gain.sum() / sampled).backward()  # type: ignore[no-untyped-call]
            passes.append(Forward(now.logprobs.detach(), now.received))
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return passes


def _sequences(rollouts: Sequence[Rollout]) -> list[RoutedSequence]:
    return [RoutedSequence(rollout.key, rollout.length) for rollout in rollouts]


def rows_of(batch: ExpertBatch) -> Rows:
    """Count a batch's rows; each sequence's last one was never processed by the engine."""
    replayed = int(batch.valid.sum())
    lengths: list[int] = batch.cu_seqlens.diff().tolist()
    masked = sum(gap.count for gap in batch.missing)
    last = int((~batch.valid[batch.cu_seqlens[1:].long() - 1]).sum())
    last -= sum(gap.first + gap.count == lengths[gap.index] for gap in batch.missing)
    return Rows(replayed, masked, len(batch.valid) - replayed - masked - last)


def _tokenize(model: Path, prompts: Sequence[str]) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:
        return [tokenizer.encode(prompt) for prompt in prompts]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]


def _reward(result: GenerateResult) -> float:
    """Share of generated tokens in a fixed quarter of the vocabulary, which any model can learn."""
    return statistics.fmean(token % 4 == 0 for token in result.output_ids or [1])


def _group_advantages(rewards: Sequence[float], group: int) -> list[float]:
    grouped = torch.tensor(rewards).view(-1, group)
    spread = grouped - grouped.mean(dim=1, keepdim=True)
    normed: list[float] = (spread / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten().tolist()
    return normed


def _rollout(
    prompt: list[int], result: GenerateResult, reward: float, advantage: float, version: int
) -> Rollout:
    if not isinstance(result.routed_experts, str):
        raise RuntimeError(
            f"a rollout came without a key: {result.error or result.routed_experts_error}"
        )
    if result.weight_version != version:
        raise RuntimeError(
            f"expected rollouts of weights {version}, got one of {result.weight_version}"
        )
    return Rollout(
        prompt, result.output_ids, result.logprobs, result.routed_experts, reward, advantage
    )


def _gap(rows: Sequence[Pack], scored: Sequence[Forward], routed: Sequence[Forward]) -> Gap:
    """Compare ``scored`` log-probabilities with the sampler's, and the experts of both passes.

    KL is the k3 estimate of KL(sampler, trainer) on the sampled tokens: ratio - 1 - log ratio.
    """
    log_ratio = torch.cat(
        [
            one.logprobs.double() - pack.sampler_logprobs
            for one, pack in zip(scored, rows, strict=True)
        ]
    )
    return Gap(
        different=max(_different(rows, scored), _different(rows, routed)),
        kl=float((log_ratio.exp() - 1 - log_ratio).mean()),
        ratio=float(log_ratio.abs().max().exp()),
    )


def _different(rows: Sequence[Pack], passes: Sequence[Forward]) -> float:
    """Share of (token, layer) pairs whose experts, as sets, are not the sampler's."""
    different = pairs = 0
    for pack, one in zip(rows, passes, strict=True):
        recorded = _moe_columns(pack.routes)[pack.routes.valid].long().sort(-1).values
        received = one.received[pack.routes.valid].long().sort(-1).values
        unequal = (recorded != received).any(-1)
        different += int(unequal.sum())
        pairs += unequal.numel()
    return different / pairs


def _moe_columns(batch: ExpertBatch) -> torch.Tensor:
    """Return ``[tokens, moe_layers, top_k]``: an engine may have recorded dense layers' columns."""
    per_moe_layer = batch.ids.shape[1] == len(batch.layers)
    return batch.ids if per_moe_layer else batch.ids[:, list(batch.layers)]


def _sizes(batch: ExpertBatch) -> tuple[int, int]:
    """Return the bytes of the same routes as JSON and as base64 of the narrowest ids."""
    ids = batch.ids[batch.valid].numpy()
    return len(json.dumps(ids.tolist())), len(base64.b64encode(ids.tobytes()))
