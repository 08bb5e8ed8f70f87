"""Let a model that forgets its routes return them, as the families that LMDeploy records do."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lmdeploy.pytorch.distributed import get_dist_manager
from torch import nn

from serve_app.engines.lmdeploy.capture.blocks import Block, find_blocks
from serve_app.engines.lmdeploy.capture.step import Step

ARGUMENT = "all_routed_experts"
_BY_ITSELF = "enable_return_routed_experts"


def records_itself(model: nn.Module) -> bool:
    """Whether LMDeploy's model (or the language model in it) returns its routes already."""
    return any(getattr(module, _BY_ITSELF, False) for module in model.modules())


def record(model: Any, layers: int, top_k: int) -> int:
    """Make ``model`` return the experts of all ``layers``; return how many have some.

    A rank records the tokens that it is given: gathering those of other ranks (dp with tp) and
    sending them to other ranks (ep) happens inside the experts module, after its ids were read.
    """
    blocks = list(find_blocks(model))
    if not blocks:
        return 0
    if get_dist_manager().current_config().enable_microbatch:
        raise ValueError(
            f"{type(model).__name__}: routed experts are not recorded with enable_microbatch,"
            " which calls the parts of a MoE block one by one: expected it off"
        )
    step = Step(layers, top_k)
    for block in blocks:
        _watch(block, step)
    model.forward = _returning_rows(model.forward, step)
    return len(blocks)


def _watch(block: Block, step: Step) -> None:
    """Read the ids that a block's experts are called with.

    Some blocks can write them by themselves and are only not asked: they are, since they may
    turn logical ids into physical ones before the call (expert-parallel load balancing).
    """
    if ARGUMENT in inspect.signature(block.module.forward).parameters:
        block.module.register_forward_pre_hook(_asked(step), with_kwargs=True)
    else:
        block.experts.register_forward_pre_hook(_read(step, block.layer))


def _asked(step: Step) -> Callable[..., Any]:
    def hand_down(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, ARGUMENT: step.rows}

    return hand_down


def _read(step: Step, layer: int) -> Callable[..., None]:
    def write(experts: nn.Module, args: tuple[Any, ...]) -> None:
        _hidden, _weights, ids = args
        step.write(layer, ids)

    return write


def _returning_rows(plain: Callable[..., Any], step: Step) -> Callable[..., dict[str, Any]]:
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> dict[str, Any]:
        rows = step.begin(kwargs["input_ids"])
        try:
            output = plain(*args, **kwargs)
        finally:
            step.end()
        outputs = output if isinstance(output, dict) else {"hidden_states": output}
        return {**outputs, ARGUMENT: rows}

    return forward
