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

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """Keep a copy: some experts modules remap their ids in place."""
        if layer in self._by_layer:
            raise EngineError(f"layer {layer} called its experts twice in one forward pass")
        self._by_layer[layer] = ids.clone()

    def ids(self) -> Ids:
        """Return ``[tokens, moe_layers, top_k]`` in the stored dtype, in layer order."""
        missing = [layer for layer in self._layers if layer not in self._by_layer]
        if missing:
            raise EngineError(f"layers {missing} did not call their experts in this forward pass")
        array = torch.stack([self._by_layer[layer] for layer in self._layers], dim=1).cpu().numpy()
        # Checked before narrowing: afterwards an id out of range would look like a good one.
        if array.min() < 0 or array.max() >= self._num_experts:
            raise EngineError(
                f"expert ids must be in [0, {self._num_experts}), the model used"
                f" {array.min()} to {array.max()}"
            )
        return array.astype(narrowest_dtype(self._num_experts))


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
