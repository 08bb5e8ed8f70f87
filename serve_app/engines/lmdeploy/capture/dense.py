"""Dense layers among the sparse ones of Qwen3-MoE and what is built of its layers.

Its decoder layer hands the buffer of the routes to whatever is its MLP, and the dense one takes
no such argument; LMDeploy 0.18 dies of it, also where no routes are wanted.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from serve_app.engines.lmdeploy.capture.blocks import layer_of
from serve_app.engines.lmdeploy.capture.recording import ARGUMENT


def mend_dense_layers(model: nn.Module) -> None:
    """Keep the buffer from dense MLPs, and their columns, which nobody writes, at 0."""
    from lmdeploy.pytorch.models.qwen3_moe import Qwen3MoeMLP  # kernels that are built on import

    for name, module in model.named_modules():
        layer = layer_of(f"{name}.")
        if layer is not None and isinstance(module, Qwen3MoeMLP):
            module.register_forward_pre_hook(_without_rows(layer), with_kwargs=True)


def _without_rows(layer: int) -> Callable[..., Any]:
    def drop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = kwargs.pop(ARGUMENT, None)
        if rows is not None:
            rows[:, layer].zero_()
        return args, kwargs

    return drop
