"""Forced routing in training: a model routes its tokens to the experts that sampling used.

A router runs as it is while its top-k is answered with recorded ids (`ForcedTopK`), so gate
weights stay the model's own, normalised its own way, and gradients reach the router.

Gradient checkpointing runs layers again in backward, maybe after the context was left and in a
thread of autograd. The checkpoint functions of the model are therefore wrapped while the context
is open: what they were given carries its routes along, and forces them again when it runs again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from serve_app.engines.moe import MoeBlock, MoeShape, decoder_of, find_moe_blocks, shape_of
from serve_app.errors import EngineError, ReplayError
from serve_app.replay.forcing import ForcedTopK, Routes
from serve_app.types import ExpertBatch

UNREPLAYABLE = {
    "deepseek_v4": "its hash-routed layers choose experts by token id, not by score",
    "phimoe": "its sparsemixer chooses and weighs experts in one step",
}
# Their top-k is taken in the block, not in the child called router.
CHOOSES_IN_BLOCK = ("dbrx",)
# What packed sequences see of each other; layers that carry state are found in the config.
UNPACKABLE = {
    "afmoe": "its masks ignore position_ids",
    "deepseek_v32": "its indexer picks keys of other sequences",
    "glm_moe_dsa": "its indexer picks keys of other sequences",
    "gpt_oss": "its masks ignore position_ids",
}
PACKABLE_WITH_OWN_MASKS = ("afmoe", "gpt_oss")

CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


@contextmanager
def replay_routing(model: nn.Module, batch: ExpertBatch) -> Iterator[None]:
    """Route one forward pass of ``model`` to the experts in ``batch``.

    ``batch.ids`` ``[tokens, layers, top_k]`` covers all layers of the model or its MoE layers
    (``batch.layers``). Its rows are the token rows of the forward pass, flattened: ``[1, total]``
    packed with restarting ``position_ids`` and ``use_cache=False``, or ``[B, T]`` padded. Rows
    with ``valid=False`` route natively. Backward may run inside the context or after it, also
    with gradient checkpointing that the model itself or `CheckpointWrapper` does.

    Raises `ReplayError` for a model that cannot be replayed, a batch that was not made for it,
    rows that do not match, a second forward pass, nesting, sequences packed into a row by a
    family that does not keep them apart, and at the end for MoE layers that used no routes.
    """
    replay = _Replay(model, batch)
    with replay.patches():
        yield
    # Not reached with an exception in flight: that one says more.
    replay.check_all_layers_used()


class _Replay:
    """The routes of one forward pass and what it used of them."""

    def __init__(self, model: nn.Module, batch: ExpertBatch) -> None:
        self._model = model
        self._blocks, self._shape = _replayable(model)
        self._routes = Routes(batch, self._shape)
        self._choosers = {
            block.layer: _chooser(self._shape.family, block) for block in self._blocks
        }
        self._originals = {layer: module.forward for layer, module in self._choosers.items()}
        if any(isinstance(original, _ForcedForward) for original in self._originals.values()):
            raise ReplayError("replay_routing is open on this model already; it does not nest")
        self._used: set[int] = set()

    @contextmanager
    def patches(self) -> Iterator[None]:
        """Force the routers, and teach the checkpoint functions to; undo it at the end."""
        with ExitStack() as stack:
            stack.enter_context(self._forced(self._blocks, again=False))
            for owner in self._model.modules():
                for name in CHECKPOINT_FUNCTIONS:
                    if name in vars(owner) and (blocks := self._blocks_in(owner)):
                        bound = self._checkpoint_function(vars(owner)[name], blocks)
                        stack.enter_context(_replaced(owner, name, bound))
            guard = decoder_of(self._model).register_forward_pre_hook(
                self._check_packing, with_kwargs=True
            )
            stack.callback(guard.remove)
            yield

    def run(self, block: MoeBlock, again: bool, *args: Any, **kwargs: Any) -> Any:
        """Run the block's router with its choice forced; ``again`` in a recomputation."""
        if not again and block.layer in self._used:
            raise ReplayError(
                f"layer {block.layer} used its routes already: expected one forward pass in a "
                "context, found a second"
            )
        with ForcedTopK(self._routes.layer(block.layer)) as choice:
            result = self._originals[block.layer](*args, **kwargs)
        if not choice.answered:
            raise ReplayError(
                f"{self._shape.family}: the router of layer {block.layer} was expected to take a "
                f"top-{block.top_k} over {block.num_experts} experts, and did not"
            )
        self._used.add(block.layer)
        return result

    def check_all_layers_used(self) -> None:
        """Raise `ReplayError` naming the MoE layers that ran without their routes."""
        if unused := [layer for layer in self._shape.moe_layers if layer not in self._used]:
            raise ReplayError(
                f"expected all {len(self._blocks)} MoE layers to use their routes, "
                f"layers {unused} did not"
            )

    @contextmanager
    def _forced(self, blocks: Sequence[MoeBlock], again: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for block in blocks:
                forward = _ForcedForward(self, block, again)
                stack.enter_context(_replaced(self._choosers[block.layer], "forward", forward))
            yield

    def _blocks_in(self, owner: nn.Module) -> list[MoeBlock]:
        inside = {id(module) for module in owner.modules()}
        return [block for block in self._blocks if id(block.router) in inside]

    def _checkpoint_function(
        self, checkpoint: Callable[..., Any], blocks: Sequence[MoeBlock]
    ) -> Callable[..., Any]:
        """Like ``checkpoint(function, *args)``, but ``function`` takes its routes along."""

        def bound_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return checkpoint(self._with_routes(function, blocks), *args, **kwargs)

        return bound_checkpoint

    def _with_routes(
        self, function: Callable[..., Any], blocks: Sequence[MoeBlock]
    ) -> Callable[..., Any]:
        """Return ``function``, forcing the blocks again every time but the first it runs."""
        ran = False

        def bound(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return function(*args, **kwargs)
            with self._forced(blocks, again=True):
                return function(*args, **kwargs)

        return bound

    def _check_packing(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        reason = _why_unpackable(self._shape.family, decoder)
        if reason is None or _has_own_masks(self._shape.family, kwargs):
            return
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows = next(len(value) for value in inputs if isinstance(value, torch.Tensor))
        if rows < self._routes.sequences:
            raise ReplayError(
                f"{self._shape.family} cannot keep packed sequences apart ({reason}): expected "
                f"{self._routes.sequences} sequences in as many rows, found {rows} rows"
            )


class _ForcedForward:
    """Takes the place of a router's ``forward``."""

    def __init__(self, replay: _Replay, block: MoeBlock, again: bool) -> None:
        self._replay = replay
        self._block = block
        self._again = again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replay.run(self._block, self._again, *args, **kwargs)


def _replayable(model: nn.Module) -> tuple[list[MoeBlock], MoeShape]:
    try:
        blocks = find_moe_blocks(model)
        shape = shape_of(model, blocks)
    except EngineError as error:
        raise ReplayError(str(error)) from error
    if reason := UNREPLAYABLE.get(shape.family):
        raise ReplayError(f"{shape.family}: routes cannot be replayed: {reason}")
    return blocks, shape


def _chooser(family: str, block: MoeBlock) -> nn.Module:
    """Return the module whose forward takes the top-k: the smallest, so that nothing else in it
    is patched (Gemma 4's block is the checkpointed layer itself)."""
    return block.block if family in CHOOSES_IN_BLOCK else block.router


def _why_unpackable(family: str, decoder: nn.Module) -> str | None:
    config: Any = decoder.config
    kinds = {
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "layers_block_type", None) or ()),
    }
    if stateful := kinds & {"linear_attention", "mamba", "conv", "recurrent"}:
        return f"its {', '.join(sorted(stateful))} layers carry state along"
    return UNPACKABLE.get(family)


def _has_own_masks(family: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether 4D masks were passed in, which can be block-diagonal."""
    mask = kwargs.get("attention_mask")
    is_full = isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() == 4)
    return family in PACKABLE_WITH_OWN_MASKS and is_full


@contextmanager
def _replaced(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an instance attribute, and put back what was there, or nothing."""
    attributes = vars(module)
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had:
            attributes[name] = before
        else:
            del attributes[name]
