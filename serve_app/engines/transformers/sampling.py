"""From logits to tokens. Knows nothing of requests, batches or models.

Each request draws one uniform number a token from its own generator and looks it up in its
cumulated distribution, so what it draws doesn't depend on its neighbours in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serve_app.engines.transformers.penalties import Penalties


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick; ``temperature=0`` is greedy.

    ``top_k=0``, ``top_p=1`` and ``min_p=0`` filter nothing; ``min_p`` excludes tokens that are
    less than that share as likely as the likeliest one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are excluded."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Sampler:
    """One request's way to pick, its random state and what changes its logits."""

    def __init__(
        self, sampling: Sampling, seed: int | None, penalties: Penalties | None = None
    ) -> None:
        self.sampling = sampling
        self.penalties = penalties
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def took(self, token: int) -> None:
        """Count a token that became part of the output."""
        if self.penalties is not None:
            self.penalties.took(token)

    def draw(self) -> float:
        """Return the next uniform number in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[float]]:
    """Pick one token a row of ``logits`` ``[rows, vocab]``; return ids and raw logprobs.

    Raw: log-softmax in fp32 before anything else. A row that isn't finite gives NaN.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    logits = _penalised(logits, samplers)
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.sampling.greedy]
    plain = [row for row in drawn if not samplers[row].sampling.filtered]
    if plain:
        chosen = logits if len(plain) == len(samplers) else logits[plain]
        temperatures = [samplers[row].sampling.temperature for row in plain]
        weights = _weights(chosen, torch.tensor(temperatures).to(logits)[:, None])
        tokens[plain] = _look_up(weights, [samplers[row].draw() for row in plain])
    for row in drawn:
        sampler = samplers[row]
        if sampler.sampling.filtered:
            tokens[row] = _sample_filtered(logits[row], sampler)
    picked = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens.tolist(), picked.tolist()


def _penalised(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    changed = [row for row, sampler in enumerate(samplers) if sampler.penalties is not None]
    if changed:
        logits = logits.clone()  # in fp32 they are the model's own
    for row in changed:
        penalties = samplers[row].penalties
        assert penalties is not None
        logits[row] = penalties.apply(logits[row])
    return logits


def _sample_filtered(logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """Pick from ``logits`` ``[vocab]``: top-k and min-p first, then top-p of what is left."""
    sampling = sampler.sampling
    if sampling.top_k:
        kept, ids = logits.topk(min(sampling.top_k, len(logits)))
    else:
        kept, ids = logits.sort(descending=True, stable=True)
    weights = _weights(kept[None], sampling.temperature)
    if sampling.min_p:  # the likeliest one has weight 1
        weights = weights.masked_fill(weights < sampling.min_p, 0.0)
    if sampling.top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        weights = weights.masked_fill(before >= sampling.top_p * weights.sum(), 0.0)
    return ids[_look_up(weights, [sampler.draw()])[0]]


def _weights(logits: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """Return unnormalised probabilities in fp64: a cumulated vocabulary is too long for fp32."""
    highest = logits.amax(dim=-1, keepdim=True)
    # Shifted before the division, so that a tiny temperature gives 0 and not infinity.
    return ((logits - highest) / temperature).exp().double()


def _look_up(weights: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """Return for each row of ``weights`` the first index whose cumulated weight is above u."""
    cumulated = weights.cumsum(dim=-1)
    wanted = cumulated[:, -1:] * torch.tensor(uniform, dtype=weights.dtype).to(weights)[:, None]
    index = torch.searchsorted(cumulated, wanted, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)
