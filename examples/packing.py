"""Rollouts as the trainer reads them: several to a packed row ``[1, total]``, with their routes."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from serve_app.types import ExpertBatch


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer to one prompt, and what it was worth within its group."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    key: str
    reward: float
    advantage: float

    @property
    def length(self) -> int:
        """Input rows in training: all tokens, the last one without captured routes."""
        return len(self.prompt_ids) + len(self.output_ids)


@dataclass(frozen=True, slots=True)
class Pack:
    """Some rollouts in one row: ``[1, total]`` inputs, and ``[sampled]`` values of their outputs.

    ``predicting`` are the rows whose logits predict the sampled tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predicting: torch.Tensor
    sampled: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    routes: ExpertBatch


def packs(rollouts: Sequence[Rollout], batch: ExpertBatch, size: int) -> Iterator[Pack]:
    """Cut a step's rollouts, and the batch materialized for all of them, into packed rows."""
    for first in range(0, len(rollouts), size):
        chosen = rollouts[first : first + size]
        yield _pack(chosen, _routes_of(batch, first, first + len(chosen)))


def _pack(rollouts: Sequence[Rollout], routes: ExpertBatch) -> Pack:
    input_ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    for rollout in rollouts:
        first_output = len(input_ids) + len(rollout.prompt_ids)
        input_ids += rollout.prompt_ids + rollout.output_ids
        positions += range(rollout.length)
        predicting += range(first_output - 1, len(input_ids) - 1)
    return Pack(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([positions]),
        predicting=torch.tensor(predicting),
        sampled=torch.tensor([token for each in rollouts for token in each.output_ids]),
        sampler_logprobs=torch.tensor([value for each in rollouts for value in each.logprobs]),
        advantages=torch.tensor([each.advantage for each in rollouts for _ in each.output_ids]),
        routes=routes,
    )


def _routes_of(batch: ExpertBatch, first: int, last: int) -> ExpertBatch:
    begin, end = int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last])
    rows = slice(begin, end)
    return dataclasses.replace(
        batch,
        ids=batch.ids[rows],
        valid=batch.valid[rows],
        cu_seqlens=batch.cu_seqlens[first : last + 1] - begin,
        tokens=None if batch.tokens is None else batch.tokens[rows],
        version_of=None if batch.version_of is None else batch.version_of[rows],
    )
