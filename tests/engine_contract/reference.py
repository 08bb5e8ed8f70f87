"""What an engine is compared with: the same model in plain Transformers."""

from typing import Protocol

import torch

from serve_app.records import Ids

Weights = dict[str, torch.Tensor]


class Reference(Protocol):
    """The served model without an engine."""

    def teacher_force(self, tokens: list[int]) -> tuple[Ids, torch.Tensor]:
        """Return experts ``[tokens, moe_layers, top_k]`` and logprobs ``[tokens, vocab]``."""
        ...

    def decode(self, tokens: list[int]) -> str: ...

    def weights(self) -> Weights: ...
