"""Which experts a Hugging Face MoE really used, read from the calls of its experts modules."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from serve_app.engines.moe import MoeBlock
from serve_app.errors import EngineError
from serve_app.records import Ids, narrowest_dtype


class Captured:
    """The ids of one forward pass, one tensor ``[tokens, top_k]`` a sparse layer."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self._layers = layers
        self._num_experts = num_experts
        self._by_layer: dict[int, torch.Tensor] = {}
        self._converted: Ids | None = None

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """Keep a copy: some experts modules remap their ids in place."""
        if layer in self._by_layer:
            raise EngineError(f"layer {layer} called its experts twice in one forward pass")
        self._by_layer[layer] = ids.clone()

    def ids(self) -> Ids:
        """Return ``[tokens, moe_layers, top_k]`` in the stored dtype, in layer order."""
        if self._converted is None:
            convert([self])
        assert self._converted is not None
        return self._converted

    @property
    def is_converted(self) -> bool:
        """Whether `ids` has nothing left to do."""
        return self._converted is not None

    def in_order(self) -> list[torch.Tensor]:
        """Return what was captured, in layer order."""
        missing = [layer for layer in self._layers if layer not in self._by_layer]
        if missing:
            raise EngineError(f"layers {missing} did not call their experts in this forward pass")
        return [self._by_layer[layer] for layer in self._layers]

    def take_converted(self, ids: Ids) -> None:
        """Keep ids ``[moe_layers, tokens, top_k]`` in the place of what was captured."""
        self._converted = ids.swapaxes(0, 1)
        self._by_layer.clear()

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return self._num_experts


def convert(captures: Sequence[Captured]) -> None:
    """Check and narrow the ids of several passes of one model.

    Together, because one pass of one token costs as much as twenty of them: as long as the step
    is small, this is what recording costs.
    """
    parts = [captured.in_order() for captured in captures]
    array = torch.cat([ids for part in parts for ids in part]).cpu().numpy()
    num_experts = captures[0].num_experts
    # Checked before narrowing: afterwards an id out of range would look like a good one.
    if array.min() < 0 or array.max() >= num_experts:
        raise EngineError(
            f"expert ids must be in [0, {num_experts}), the model used"
            f" {array.min()} to {array.max()}"
        )
    narrow: Ids = array.astype(narrowest_dtype(num_experts))
    first = 0
    for captured, part in zip(captures, parts, strict=True):
        stop = first + len(part) * len(part[0])
        captured.take_converted(narrow[first:stop].reshape(len(part), len(part[0]), -1))
        first = stop


class ExpertRecorder:
    """Hooks on the experts modules of one model. Reads only while a capture is open."""

    def __init__(self, blocks: Sequence[MoeBlock]) -> None:
        self._layers = [block.layer for block in blocks]
        self._num_experts = blocks[0].num_experts
        self._open: Captured | None = None
        self._hooks = [
            block.experts.register_forward_pre_hook(partial(self._read, block), with_kwargs=True)
            for block in blocks
        ]

    @contextmanager
    def capture(self) -> Iterator[Captured]:
        """Read the forward pass run inside the block."""
        self._open = Captured(self._layers, self._num_experts)
        try:
            yield self._open
        finally:
            self._open = None

    def close(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def _read(
        self, block: MoeBlock, _: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        if self._open is not None:
            self._open.add(block.layer, block.routed_ids(args, kwargs))
