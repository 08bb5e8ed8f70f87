"""The ids of all layers of one decode step, written at once.

A model of LMDeploy's writes each layer's experts into its column of one buffer as soon as they are
known: a kernel a layer, and in a decode step none of them has work for more than its launch. Here
the layers' ids wait until the last one has been through, and two kernels write them all.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lmdeploy.pytorch.engine.model_agent.agent import BaseModelAgent
from lmdeploy.pytorch.model_inputs import get_step_ctx_manager
from torch import nn

ARGUMENT = "all_routed_experts"
_ALL = slice(None)

_build_model = BaseModelAgent._build_model


class LayerIds:
    """Stands for the buffer ``[tokens, layers, top_k]`` in one forward pass.

    While a CUDA graph is captured it holds the ids, so that their memory is no other kernel's;
    a replay runs kernels and no Python. Whoever does more with the buffer than write a column
    finds all that was written before.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._waiting: dict[int, torch.Tensor] = {}

    def __setitem__(self, where: Any, ids: torch.Tensor) -> None:
        layer = _column(where)
        if layer is None:
            self.written()[where] = ids
        else:
            self._waiting[layer] = ids

    def __getitem__(self, where: Any) -> torch.Tensor:
        return self.written()[where]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.written(), name)

    def written(self) -> torch.Tensor:
        """Write what waits; return the buffer."""
        for first, ids in _runs(self._waiting):
            columns = self._buffer[:, first : first + len(ids)]
            columns.copy_(torch.stack(ids, dim=1))
        self._waiting = {}
        return self._buffer


def gather_when_built() -> None:
    """Gather the ids of models that this process builds from now on. Idempotent."""
    BaseModelAgent._build_model = _build


def gather(model: nn.Module) -> bool:
    """Let ``model`` write a decode step's ids at once; return whether it is one that can.

    It can where one module gets the buffer and hands it on to all layers. A prefill is left as it
    is: its many ids would have to be held, and its kernels have work enough.
    """
    decoders = list(_takers(model))
    if len(decoders) != 1:
        return False
    decoder: Any = decoders[0]
    decoder.forward = _gathering(decoder.forward)
    return True


def _build(agent: Any) -> None:
    _build_model(agent)
    gather(agent.patched_model)


def _gathering(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        buffer = kwargs.get(ARGUMENT)
        if buffer is None or not get_step_ctx_manager().current_context().is_decoding:
            return forward(*args, **kwargs)
        ids = LayerIds(buffer)
        output = forward(*args, **{**kwargs, ARGUMENT: ids})
        ids.written()
        return output

    return run


def _takers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that are given the buffer."""
    if ARGUMENT in inspect.signature(module.forward).parameters:
        yield module
        return
    for child in module.children():
        yield from _takers(child)


def _column(where: Any) -> int | None:
    match where:
        case (tokens, int(layer), slots) if tokens == _ALL and slots == _ALL:
            return layer
    return None


def _runs(ids: dict[int, torch.Tensor]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield the first layer of each gapless run of layers, and their ids."""
    run: list[torch.Tensor] = []
    first = 0
    for layer in sorted(ids):
        if run and layer != first + len(run):
            yield first, run
            run = []
        if not run:
            first = layer
        run.append(ids[layer])
    if run:
        yield first, run
