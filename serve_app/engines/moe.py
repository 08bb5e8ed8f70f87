"""The MoE parts of a Hugging Face model: where its routers and experts are, found by signature.

A MoE block calls an experts module whose forward takes the chosen ids beside the hidden states;
that argument is what was really used, so recording reads it and replay checks against it.

Experts, routers and blocks may stand in wrappers (LoRA, activation checkpoints, sharding): a block
is the module nearest to its experts that has a router as a child. What it calls, wrapped or not,
is where ids are read and forced; sizes are read from what is inside, since a wrapper's attributes
mean something else (PEFT's ``num_experts`` counts the experts of one parameter).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve_app.errors import EngineError

IDS_ARGUMENTS = ("top_k_index", "router_indices", "selected_experts")
ROUTER_NAMES = ("gate", "router")
TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "top_k")

UNRECORDABLE = {
    "doge": "its experts are rows of an embedding",
    "jetmoe": "its attention is a mixture of experts too",
    "llama4": "its experts module is not told which experts were chosen",
    "nllb-moe": "it drops tokens beyond an expert's capacity",
    "switch_transformers": "it drops tokens beyond an expert's capacity",
    "zaya": "a token that skips the experts is reported as expert 0",
}


@dataclass(frozen=True, slots=True)
class MoeBlock:
    """One sparse layer: ``layer`` is the global decoder-layer index, MTP layers not counted.

    ``router`` is the child called gate or router; ``block`` the module that owns it and
    ``experts``, in Gemma 4 the decoder layer itself. Both children are what the block calls, in
    whatever wrappers they have.
    """

    layer: int
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    num_experts: int
    top_k: int
    ids_name: str
    ids_position: int

    def routed_ids(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the ids ``[tokens, top_k]`` that a call ``experts(*args, **kwargs)`` uses.

        In the router's own order and dtype (int64), not copied. Raises `EngineError` where a
        wrapper is called in another way than the experts in it.
        """
        positional = self.ids_position < len(args)
        ids = args[self.ids_position] if positional else kwargs.get(self.ids_name)
        if not isinstance(ids, torch.Tensor):
            found = type(ids).__name__
        elif ids.is_floating_point() or ids.shape[-1] != self.top_k:
            found = f"{ids.dtype} {list(ids.shape)}"
        else:
            return ids.reshape(-1, ids.shape[-1])
        raise EngineError(
            f"layer {self.layer}: {type(self.experts).__name__} was expected to be called with"
            f" {self.ids_name} [tokens, {self.top_k}], got {found}"
        )


@dataclass(frozen=True, slots=True)
class MoeShape:
    """What a record of this model looks like.

    ``layers`` counts all decoder layers without MTP, ``moe_layers`` are the global indices of
    the sparse ones. A dense model has none, and 0 experts.
    """

    family: str
    layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int


def family_of(model: nn.Module) -> str:
    """Return the model type of the text model, e.g. ``qwen3_moe``."""
    return _family(_text_config(pretrained(model)))


def moe_shape(model: nn.Module) -> MoeShape:
    """Return the model's layers and experts. Raises `EngineError` as `find_moe_blocks` does."""
    return shape_of(model, find_moe_blocks(model))


def shape_of(model: nn.Module, blocks: Sequence[MoeBlock]) -> MoeShape:
    """Like `moe_shape`, for blocks that were found already."""
    found = pretrained(model)
    config = _text_config(found)
    stack = _decoder_layers(found, config)
    return MoeShape(
        family=_family(config),
        layers=_count_layers(stack, config),
        moe_layers=tuple(block.layer for block in blocks),
        num_experts=blocks[0].num_experts if blocks else 0,
        top_k=blocks[0].top_k if blocks else 0,
    )


def find_moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Return the sparse layers in layer order; a dense model has none.

    ``model`` is a Hugging Face model or any module around one. Raises `EngineError` where
    experts are there but cannot be recorded, or layers differ in experts or top-k.
    """
    found = pretrained(model)
    config = _text_config(found)
    family = _family(config)
    if reason := UNRECORDABLE.get(family.removesuffix("_text")):
        raise EngineError(f"{family}: routed experts cannot be recorded: {reason}")
    stack = _decoder_layers(found, config)
    blocks = [
        block
        for index in range(_count_layers(stack, config))
        for block in _blocks_of_layer(family, index, stack[index], config)
    ]
    _check_uniform(family, blocks)
    return blocks


def pretrained(model: nn.Module) -> Any:
    """Return the outermost Hugging Face model in ``model``."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "model_type"):
            return module
    raise EngineError(f"{type(model).__name__} contains no Hugging Face model")


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the text decoder: the module that is given token ids or embeddings."""
    found = pretrained(model)
    decoder = found.get_decoder() if hasattr(found, "get_decoder") else found
    assert isinstance(decoder, nn.Module)
    return decoder


def _text_config(found: Any) -> Any:
    config = found.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _family(config: Any) -> str:
    return str(config.model_type)


def _decoder_layers(found: Any, config: Any) -> nn.ModuleList:
    """Return the stack of decoder layers; an image tower or an MTP head is not below it."""
    decoder = decoder_of(found)
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and "mtp" not in name and not nested:
            stacks[name] = module
    if not stacks:
        raise EngineError(f"{_family(config)}: no list of decoder layers found")
    wanted = getattr(config, "num_hidden_layers", None)
    candidates = list(stacks.values())
    return next((stack for stack in candidates if len(stack) == wanted), candidates[0])


def _count_layers(stack: nn.ModuleList, config: Any) -> int:
    """Layers beyond ``num_hidden_layers`` are MTP; LongCat has fewer, two attentions in each."""
    return min(len(stack), int(getattr(config, "num_hidden_layers", len(stack))))


def _blocks_of_layer(family: str, index: int, layer: nn.Module, config: Any) -> Iterator[MoeBlock]:
    parents = {child: parent for parent in layer.modules() for child in parent.children()}
    blocks: dict[nn.Module, MoeBlock] = {}
    known: set[nn.Module] = set()
    for module in layer.modules():
        if module in known or (position := _ids_argument(module)) is None:
            continue
        block, experts = _owner(family, index, module, parents)
        if block in blocks:
            raise EngineError(
                f"{family}: layer {index}: {type(block).__name__} has more than one experts module"
            )
        known.update(experts.modules())
        blocks[block] = _moe_block(family, index, block, experts, position, config)
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts" and module not in known:
            raise EngineError(
                f"{family}: layer {index} has experts in {name} ({type(module).__name__}) whose "
                f"forward takes none of {', '.join(IDS_ARGUMENTS)}"
            )
    if len(blocks) > 1:
        raise EngineError(f"{family}: layer {index} has {len(blocks)} MoE blocks, expected one")
    yield from blocks.values()


def _owner(
    family: str, index: int, experts: nn.Module, parents: Mapping[nn.Module, nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """Return the block of some experts, and its child that is them in all of their wrappers."""
    child, parent = experts, parents.get(experts)
    while parent is not None:
        if _router(parent) is not None:
            return parent, child
        child, parent = parent, parents.get(parent)
    owner = parents.get(experts, experts)
    raise EngineError(
        f"{family}: {type(owner).__name__} in layer {index} has no child called "
        f"{' or '.join(ROUTER_NAMES)}"
    )


def _router(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    return next((children[name] for name in ROUTER_NAMES if name in children), None)


def _ids_argument(module: nn.Module) -> tuple[str, int] | None:
    """Return name and position of the ids in the module's forward, None if it takes none."""
    names = list(inspect.signature(module.forward).parameters)
    found = next((name for name in IDS_ARGUMENTS if name in names), None)
    return None if found is None else (found, names.index(found))


def _moe_block(
    family: str,
    index: int,
    block: nn.Module,
    experts: nn.Module,
    ids_argument: tuple[str, int],
    config: Any,
) -> MoeBlock:
    router = _router(block)
    assert router is not None
    return MoeBlock(
        layer=index,
        block=block,
        experts=experts,
        router=router,
        num_experts=_first_int(
            family,
            "number of experts",
            # LongCat's identity experts are chosen like any other.
            *((module, "total_experts") for module in _inside_out(experts)),
            *((module, "num_experts") for module in _inside_out(router)),
            *((module, "num_experts") for module in _inside_out(experts)),
        ),
        top_k=_first_int(
            family,
            "top-k",
            *((module, "top_k") for module in _inside_out(router)),
            (block, "top_k"),
            *((config, name) for name in TOP_K_NAMES),
        ),
        ids_name=ids_argument[0],
        ids_position=ids_argument[1],
    )


def _inside_out(module: nn.Module) -> list[nn.Module]:
    """Return a module's own modules and itself, what is wrapped before its wrapper."""
    return list(module.modules())[::-1]


def _first_int(family: str, what: str, *places: tuple[Any, str]) -> int:
    for owner, name in places:
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    raise EngineError(f"{family}: {what} not found")


def _check_uniform(family: str, blocks: Sequence[MoeBlock]) -> None:
    shapes = {(block.num_experts, block.top_k) for block in blocks}
    if len(shapes) > 1:
        raise EngineError(
            f"{family}: layers differ in (experts, top-k): {sorted(shapes)}; a record has one width"
        )
