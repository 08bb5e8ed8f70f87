"""A request in LMDeploy's words, without its traps.

``do_sample`` is off by default and then drops the repetition penalty, so it is always on and
greedy is top-k 1; ``top_k`` is 50 by default; ``ignore_eos`` forbids the stop tokens instead of
ignoring them, and the tokenizer's EOS is always added to them, so they are set at the end of all.
Its repetition penalty does not see the prompt, and it has no bias and no other penalty: these
are a logits processor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.types import GenerateRequest

if TYPE_CHECKING:
    import torch
    from lmdeploy import GenerationConfig


def generation_config(
    request: GenerateRequest,
    *,
    stop_ids: Iterable[int],
    max_new_tokens: int,
    routes: bool,
    padding: int,
) -> "GenerationConfig":
    """Return what `EngineInstance.async_stream_infer` takes."""
    from lmdeploy import GenerationConfig

    greedy = request.temperature == 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(request.min_new_tokens, max_new_tokens),
        do_sample=True,
        top_k=1 if greedy else request.top_k,
        top_p=1.0 if greedy else request.top_p,
        min_p=0.0 if greedy else request.min_p,
        random_seed=request.seed,
        stop_token_ids=sorted(stop_ids),
        logprobs=1,  # of the sampled token and of the likeliest
        logits_processors=_processors(request, padding),
        return_routed_experts=routes,
    )
    # Its constructor takes 2 at most, its engine any.
    config.temperature = 1.0 if greedy else request.temperature
    return config


def _processors(request: GenerateRequest, padding: int) -> "list[LogitRules] | None":
    rules = LogitRules(
        prompt=tuple(request.input_ids),
        padding=padding,
        bias=tuple(request.logit_bias.items()),
        repetition=request.repetition_penalty,
        presence=request.presence_penalty,
        frequency=request.frequency_penalty,
    )
    return None if rules.idle else [rules]


@dataclass(frozen=True, slots=True)
class LogitRules:
    """Bias, then repetition, presence and frequency, as the Transformers engine has them.

    Holds no state: a Ray worker gets another copy with every prefill of its batch.
    """

    prompt: tuple[int, ...]
    padding: int = 0
    bias: tuple[tuple[int, float], ...] = ()
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether no logit is ever changed."""
        return not self.bias and self.repetition == 1 and self.presence == 0 == self.frequency

    def __call__(self, ids: "torch.Tensor", logits: "torch.Tensor") -> "torch.Tensor":
        """Change ``logits`` ``[vocab]``; ``ids`` are padding, prompt and output so far."""
        import torch

        logits = logits.float()
        if self.bias:
            where = torch.tensor([token for token, _ in self.bias], device=logits.device)
            by = torch.tensor([value for _, value in self.bias], device=logits.device)
            logits = logits.index_add(0, where, by)
        output = torch.tensor(self._output(ids.tolist()), device=logits.device).long()
        if self.repetition != 1:
            seen = torch.cat([torch.tensor(self.prompt, device=logits.device), output])
            old = logits[seen]
            new = torch.where(old > 0, old / self.repetition, old * self.repetition)
            logits = logits.index_put((seen,), new)
        if self.presence or self.frequency:
            counts = torch.bincount(output, minlength=len(logits))
            logits = logits - self.presence * (counts > 0) - self.frequency * counts
        return logits

    def _output(self, row: list[int]) -> list[int]:
        """Return what follows the prompt. LMDeploy pads a row at its start, or behind the prompt.

        The latter when batches merge, so a padding token that was sampled is not counted.
        """
        prompt, length = list(self.prompt), len(self.prompt)
        first = next(n for n in range(len(row)) if row[n : n + length] == prompt)
        return [token for token in row[first + length :] if token != self.padding]
