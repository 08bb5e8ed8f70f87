"""A forward and a backward pass of a model, what came out, and what it left on the model."""

from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.moe import find_moe_blocks
from tests.families import VOCAB

TOKENS = 24


@dataclass
class Pass:
    """What one forward and backward did: logits, every gradient, the ids its experts got."""

    logits: torch.Tensor
    grads: dict[str, torch.Tensor | None]
    ids: torch.Tensor

    def same_bits(self, other: "Pass") -> bool:
        return torch.equal(self.logits, other.logits) and same_grads(self.grads, other.grads)


def same_grads(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None]) -> bool:
    def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        return x is y if x is None or y is None else torch.equal(x, y)

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def random_tokens(count: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def loss_of(logits: torch.Tensor) -> Any:
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def grads_of(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def run(model: Any, tokens: torch.Tensor, **inputs: Any) -> Pass:
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.experts.register_forward_pre_hook(
            lambda _, args, kwargs, block=block: seen.update(
                {block.layer: block.routed_ids(args, kwargs)}
            ),
            with_kwargs=True,
        )
        for block in find_moe_blocks(model)
    ]
    model.zero_grad()
    logits = model(tokens, use_cache=False, **inputs).logits
    loss_of(logits).backward()
    for hook in hooks:
        hook.remove()
    ids = torch.stack([seen[layer] for layer in sorted(seen)], dim=1)
    return Pass(logits.detach(), grads_of(model), ids)


def checkpoint_layers(model: Any, *, use_reentrant: bool) -> None:
    # Renamed in transformers 5.2x, where the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


def instance_state(model: Any) -> list[Any]:
    """Everything that a patch or a hook could have left on a module."""
    return [
        (name, dict(vars(module)), dict(module._forward_pre_hooks), dict(module._forward_hooks))
        for name, module in model.named_modules()
    ]
