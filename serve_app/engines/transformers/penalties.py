"""What changes one request's logits before a token is picked; logprobs stay those of the model.

In this order, as in vLLM: bias, the ban on stop tokens, then repetition, presence, frequency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class LogitRules:
    """``repetition`` looks at prompt and output, ``presence`` and ``frequency`` at the output.

    ``banned`` tokens cannot be picked before ``min_tokens`` were.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: frozenset[int] = frozenset()
    min_tokens: int = 0

    @property
    def idle(self) -> bool:
        """Whether no logit is ever changed."""
        plain = self.repetition == 1 and self.presence == 0 == self.frequency
        return plain and not self.bias and not (self.banned and self.min_tokens)


class Penalties:
    """One request's rules and the tokens that they look at."""

    def __init__(self, rules: LogitRules, prompt: Sequence[int]) -> None:
        self._rules = rules
        self._prompt = prompt
        self._total = 0
        self._uncounted: list[int] = []
        self._counts = torch.zeros(0)  # [vocab], of the output
        self._seen = torch.zeros(0, dtype=torch.bool)  # [vocab], prompt and output
        self._bias = (
            torch.tensor(list(rules.bias), dtype=torch.long),
            torch.tensor(list(rules.bias.values()), dtype=torch.float32),
        )
        self._banned = sorted(rules.banned)

    def took(self, token: int) -> None:
        """Count a picked token."""
        self._total += 1
        self._uncounted.append(token)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return changed ``logits`` ``[vocab]``; the given ones stay."""
        rules = self._rules
        self._count(len(logits))
        logits = logits.index_add(0, self._bias[0], self._bias[1])
        if self._banned and self._total < rules.min_tokens:
            logits[self._banned] = -torch.inf
        if rules.repetition != 1:
            penalised = torch.where(
                logits > 0, logits / rules.repetition, logits * rules.repetition
            )
            logits = torch.where(self._seen, penalised, logits)
        if rules.presence or rules.frequency:
            logits -= rules.presence * (self._counts > 0) + rules.frequency * self._counts
        return logits

    def _count(self, vocabulary: int) -> None:
        """Take in what was picked since the last step; the first step knows how many there are."""
        if not len(self._counts):
            self._counts = torch.zeros(vocabulary)
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[list(self._prompt)] = True
        for token in self._uncounted:
            self._counts[token] += 1
            self._seen[token] = True
        self._uncounted.clear()
