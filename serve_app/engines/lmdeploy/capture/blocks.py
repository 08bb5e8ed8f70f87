"""The MoE blocks of a model that LMDeploy has built, by the layers they are in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lmdeploy.pytorch.nn.moe.base import FusedMoEBase
from lmdeploy.pytorch.nn.moe.v4_fp4 import FusedMoEV4FP4
from torch import nn

_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERTS = (FusedMoEBase, FusedMoEV4FP4)


@dataclass(frozen=True, slots=True)
class Block:
    """The block of global decoder layer ``layer``; ``experts`` is what it calls with ids."""

    layer: int
    module: nn.Module
    experts: nn.Module


def find_blocks(model: nn.Module) -> Iterator[Block]:
    """Yield every MoE block, whatever its family calls it."""
    for name, module in model.named_modules():
        layer = layer_of(name)
        if layer is not None and isinstance(module, _EXPERTS):
            yield Block(layer, model.get_submodule(name.rpartition(".")[0]), module)


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a module's name puts it in."""
    found = _IN_LAYER.search(name)
    return int(found[1]) if found else None
