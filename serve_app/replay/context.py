"""Forced routing in training: a model routes its tokens to the experts that sampling used.

A router runs as it is while its top-k is answered with recorded ids (`ForcedTopK`), so gate
weights stay the model's own, normalised its own way, and gradients reach the router.

Gradient checkpointing runs layers again in backward, maybe after the context was left and in a
thread of autograd. What is checkpointed while the context is open carries its routes along and
forces them again when it runs again, see `serve_app.replay.recomputation`; the checkpoint
functions that the model holds are wrapped beside torch's, since they may be somebody else's.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from serve_app.engines.moe import MoeBlock, MoeShape, decoder_of, find_moe_blocks, shape_of
from serve_app.errors import EngineError, ReplayError
from serve_app.replay.forcing import ForcedTopK, Routes
from serve_app.replay.inputs import InputCheck
from serve_app.replay.recomputation import (
    INTERCEPTION,
    Progress,
    Recomputation,
    unbound_functions,
)
from serve_app.replay.trace import Trace
from serve_app.types import ExpertBatch

UNREPLAYABLE = {
    "deepseek_v4": "its hash-routed layers choose experts by token id, not by score",
    "phimoe": "its sparsemixer chooses and weighs experts in one step",
}
# Their top-k is taken in the block, not in the child called router.
CHOOSES_IN_BLOCK = ("dbrx",)

CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


@contextmanager
def replay_routing(
    model: nn.Module, batch: ExpertBatch, *, trace: Trace | None = None
) -> Iterator[None]:
    """Route one forward pass of ``model`` to the experts in ``batch``.

    ``batch.ids`` ``[tokens, layers, top_k]`` covers all layers of the model or its MoE layers
    (``batch.layers``). Its rows are the token rows of the forward pass, flattened: ``[1, total]``
    packed with restarting ``position_ids`` and ``use_cache=False``, or ``[B, T]`` right-padded.
    Rows with ``valid=False`` route natively. Experts, routers and blocks may be wrapped: by PEFT,
    activation checkpoints, sharding. Backward may run inside the context or after it, also with
    gradient checkpointing, reentrant or not, of the model's own or around any part of it.
    ``trace`` writes what the chosen sequences' routers used.

    Raises `ReplayError` for a model that cannot be replayed, a batch that was not made for it,
    rows that do not match, routes on padding by the 2D ``attention_mask``, ``position_ids`` that
    do not restart where ``cu_seqlens`` says that a sequence begins, sequences packed into a row
    by a family or a mask that does not keep them apart, a second forward pass, nesting, a
    checkpoint that is none of torch's around the model, a recomputation of an earlier forward
    pass that had no routes, and at the end for MoE layers that used no routes.
    """
    replay = _Replay(model, batch)
    with ExitStack() as stack:
        stack.enter_context(replay.open())
        if trace is not None:
            stack.enter_context(trace.of(batch, replay.blocks))
        yield
    # Not reached with an exception in flight: that one says more.
    replay.check_all_layers_used()


class _Replay:
    """The routes of one forward pass and what it used of them."""

    def __init__(self, model: nn.Module, batch: ExpertBatch) -> None:
        self._model = model
        self.blocks, self._shape = _replayable(model)
        self._routes = Routes(batch, self._shape)
        self._choosers = {block.layer: _chooser(self._shape.family, block) for block in self.blocks}
        self._originals = {layer: module.forward for layer, module in self._choosers.items()}
        if any(isinstance(original, _ForcedForward) for original in self._originals.values()):
            raise ReplayError("replay_routing is open on this model already; it does not nest")
        self._decoder, config = _decoder(model)
        self._check_inputs = InputCheck(batch, self._shape.family, config)
        self._checkpointing = _checkpoint_functions(model, self._choosers)
        self._used: set[int] = set()
        self._opened_in = (torch._C._current_graph_task_id(), len(unbound_functions()))
        self.progress = Progress()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Force the routers, teach the checkpoint functions to, check what comes; undo it all."""
        with ExitStack() as stack:
            stack.enter_context(self._forced(set(self._choosers), again=False))
            hook = self._decoder.register_forward_pre_hook(self._check_inputs, with_kwargs=True)
            stack.callback(hook.remove)
            yield

    @contextmanager
    def again(self, layers: set[int], layer: int | None) -> Iterator[None]:
        """Force ``layers`` in a recomputation, and the choice of ``layer`` if it is in one."""
        with ExitStack() as stack:
            if layers:
                stack.enter_context(self._forced(layers, again=True))
            if layer is not None:
                stack.enter_context(self.progress.routing(layer))
                stack.enter_context(ForcedTopK(self._routes.layer(layer)))
            yield

    def run(self, block: MoeBlock, again: bool, *args: Any, **kwargs: Any) -> Any:
        """Run the block's router with its choice forced; ``again`` in a recomputation."""
        if not again:
            self._check_runs_once(block.layer)
        choice = ForcedTopK(self._routes.layer(block.layer))
        with self.progress.routing(block.layer), choice:
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
                f"expected all {len(self.blocks)} MoE layers to use their routes, "
                f"layers {unused} did not"
            )

    def _check_runs_once(self, layer: int) -> None:
        """Raise unless this is the forward pass of the context, and all of it can be replayed."""
        compiling = torch.compiler.is_compiling()
        task, functions = self._opened_in
        if not compiling and torch._C._current_graph_task_id() != task:
            raise ReplayError(
                f"layer {layer} runs again in backward, for a forward pass that was not this"
                " context's: expected that backward before the context or after it"
            )
        if layer in self._used:
            raise ReplayError(
                f"layer {layer} used its routes already: expected one forward pass in a "
                "context, found a second"
            )
        if compiling or torch.is_grad_enabled() or len(found := unbound_functions()) <= functions:
            return
        raise ReplayError(
            f"layer {layer} runs in {found[0]}, an autograd.Function that may run it again in"
            " backward, without its routes: expected a checkpoint of torch.utils.checkpoint, or"
            " this context inside what is checkpointed"
        )

    @contextmanager
    def _forced(self, layers: set[int], again: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self.blocks:
                if block.layer in layers:
                    forward = _ForcedForward(self, block, again)
                    chooser = self._choosers[block.layer]
                    stack.enter_context(_replaced(chooser, "forward", forward))
            for owner, name, inside in self._checkpointing:
                if layers & inside:
                    bound = self._checkpoint_function(vars(owner)[name])
                    stack.enter_context(_replaced(owner, name, bound))
            stack.enter_context(INTERCEPTION.of(self))
            yield

    def _checkpoint_function(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Like ``checkpoint(function, *args)``, but ``function`` takes its routes along."""

        def bound_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return checkpoint(Recomputation(function, self), *args, **kwargs)

        return bound_checkpoint


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


def _checkpoint_functions(
    model: nn.Module, choosers: dict[int, nn.Module]
) -> list[tuple[nn.Module, str, set[int]]]:
    """Return who holds a checkpoint function, its name, and the layers whose routers it is of."""
    layer_of = {part: layer for layer, chooser in choosers.items() for part in chooser.modules()}
    found = []
    for owner in model.modules():
        for name in CHECKPOINT_FUNCTIONS:
            if name in vars(owner):
                layers = {layer_of[part] for part in owner.modules() if part in layer_of}
                found.append((owner, name, layers))
    return found


def _decoder(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the module that is given tokens by name, in whatever wrappers, and its config."""
    found = decoder_of(model)
    for module in found.modules():
        if "inputs_embeds" in inspect.signature(module.forward).parameters:
            return module, getattr(module, "config", None)
    raise ReplayError(f"{type(found).__name__}: expected a decoder that takes inputs_embeds")


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
