"""Recorded experts put in the place of a router's own choice; everything else stays the router's.

`Routes` are a batch's ids checked against a model, `ForcedTopK` is what one router sees of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from serve_app.engines.moe import MoeShape
from serve_app.errors import ReplayError
from serve_app.types import ExpertBatch

ID_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)

_TOP_K = (torch.topk, torch.Tensor.topk)
_MASKED_FILL = (torch.masked_fill, torch.Tensor.masked_fill)
_MASKED_FILL_INPLACE = (torch.Tensor.masked_fill_,)


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """One layer's ids ``[tokens, top_k]`` at native width, and which rows they hold for."""

    layer: int
    ids: torch.Tensor
    valid: torch.Tensor
    all_valid: bool
    num_experts: int


class Routes:
    """A batch's ids, known to fit the model.

    Raises `ReplayError` unless the batch has this model's experts, top-k and layers, and every
    valid row of every MoE layer holds top-k different ids below ``num_experts``.
    """

    def __init__(self, batch: ExpertBatch, shape: MoeShape) -> None:
        _check_model(batch, shape)
        _check_tensors(batch, shape)
        by_layer = columns_by_layer(batch)
        if missing := [layer for layer in shape.moe_layers if layer not in by_layer]:
            raise ReplayError(
                f"expected a column for each of the MoE layers {shape.moe_layers}, the batch has"
                f" none of {missing}"
            )
        self._batch = batch
        self._columns = {layer: by_layer[layer] for layer in shape.moe_layers}
        self._all_valid = bool(batch.valid.all())
        self._check_rows()

    def layer(self, layer: int) -> LayerRoutes:
        """Return the ids of one MoE layer, by global index."""
        return LayerRoutes(
            layer=layer,
            ids=self._batch.ids[:, self._columns[layer]],
            valid=self._batch.valid,
            all_valid=self._all_valid,
            num_experts=self._batch.num_experts,
        )

    def _check_rows(self) -> None:
        layers = list(self._columns)
        # One answer for all layers: on a GPU every question asked of the data waits for it.
        bad = torch.stack([_bad_rows(self.layer(layer)).any() for layer in layers]).tolist()
        for layer, is_bad in zip(layers, bad, strict=True):
            if is_bad:
                raise ReplayError(_describe_bad_row(self.layer(layer)))


def columns_by_layer(batch: ExpertBatch) -> dict[int, int]:
    """Return where in ``batch.ids`` each global layer is.

    By ``batch.columns``, in whatever order; a batch that does not say has its MoE layers, or all.
    """
    columns = batch.ids.shape[1]
    named = batch.columns or (batch.layers if columns == len(batch.layers) else range(columns))
    return {layer: at for at, layer in enumerate(named)}


class ForcedTopK(TorchFunctionMode):
    """Makes a router choose the given experts and weigh them by its own scores.

    Of a router that ran under it, ``answered`` tells whether it asked for its top-k at all.
    Group limits (``masked_fill``) apply to natively routed rows only: they would hide forced
    experts of other groups. Raises `ReplayError` where the router sees another number of rows.
    """

    def __init__(self, routes: LayerRoutes) -> None:
        super().__init__()
        self._routes = routes
        self.answered = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer top-k and masks over the experts; pass everything else on."""
        kwargs = kwargs or {}
        if func in _TOP_K:
            return self._top_k(func, *args, **kwargs)
        if func in _MASKED_FILL or func in _MASKED_FILL_INPLACE:
            return self._masked_fill(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _top_k(
        self, func: Callable[..., Any], input: torch.Tensor, k: int, dim: int = -1, **how: Any
    ) -> Any:
        top_k = self._routes.ids.shape[-1]
        is_choice = self._is_over_experts(input) and dim in (-1, input.dim() - 1) and k == top_k
        if not is_choice:
            return func(input, k, dim, **how)
        self._check_rows(input)
        ids = self._routes.ids.to(input.device).to(torch.int64).view(*input.shape[:-1], k)
        if not self._routes.all_valid:
            native = func(input, k, dim, **how)[1]
            ids = torch.where(self._valid_like(input), ids, native)
        self.answered = True
        return torch.return_types.topk((input.gather(-1, ids), ids))

    def _masked_fill(
        self, func: Callable[..., Any], input: torch.Tensor, mask: torch.Tensor, value: Any
    ) -> Any:
        if self._is_over_experts(input):
            self._check_rows(input)
            mask = mask & ~self._valid_like(input)
        return func(input, mask, value)

    def _is_over_experts(self, scores: torch.Tensor) -> bool:
        return scores.dim() > 1 and scores.shape[-1] == self._routes.num_experts

    def _valid_like(self, scores: torch.Tensor) -> torch.Tensor:
        return self._routes.valid.to(scores.device).view(*scores.shape[:-1], 1)

    def _check_rows(self, scores: torch.Tensor) -> None:
        rows = scores.numel() // scores.shape[-1]
        if rows != len(self._routes.ids):
            raise ReplayError(
                f"layer {self._routes.layer}: the batch has routes for {len(self._routes.ids)} "
                f"token rows, the forward pass has {rows}"
            )


def _check_model(batch: ExpertBatch, shape: MoeShape) -> None:
    if not shape.moe_layers:
        raise ReplayError(f"{shape.family} has no MoE layers, nothing can be replayed in it")
    if batch.num_experts != shape.num_experts:
        raise ReplayError(
            f"{shape.family} has {shape.num_experts} experts, the batch {batch.num_experts}"
        )
    if batch.layers != shape.moe_layers:
        raise ReplayError(
            f"{shape.family} has MoE layers {shape.moe_layers}, the batch {batch.layers}"
        )


def _check_tensors(batch: ExpertBatch, shape: MoeShape) -> None:
    ids = batch.ids
    if ids.dim() != 3:
        raise ReplayError(f"ids must be [tokens, layers, top_k], got {list(ids.shape)}")
    if ids.dtype not in ID_DTYPES:
        raise ReplayError(f"ids must be uint8, uint16, int32 or int64, got {ids.dtype}")
    if ids.shape[1] not in (shape.layers, len(batch.layers)):
        raise ReplayError(
            f"ids must have {shape.layers} layers (all) or {len(batch.layers)} (the MoE layers), "
            f"got {ids.shape[1]}"
        )
    if batch.columns and len(batch.columns) != ids.shape[1]:
        raise ReplayError(f"ids must have the layers {batch.columns}, got {ids.shape[1]}")
    if ids.shape[2] != shape.top_k:
        raise ReplayError(f"{shape.family} has top-k {shape.top_k}, the batch {ids.shape[2]}")
    if batch.valid.shape != ids.shape[:1] or batch.valid.dtype != torch.bool:
        raise ReplayError(
            f"valid must be bool [{ids.shape[0]}], got {batch.valid.dtype} "
            f"{list(batch.valid.shape)}"
        )


def _bad_rows(routes: LayerRoutes) -> torch.Tensor:
    """Return bool ``[tokens]``: valid rows with an id out of range, or twice."""
    ids = routes.ids.to(torch.int64)
    ascending = ids.sort(dim=-1).values
    in_range = (ascending[:, 0] >= 0) & (ascending[:, -1] < routes.num_experts)
    distinct = (ascending.diff(dim=-1) > 0).all(dim=-1)
    return routes.valid.to(ids.device) & ~(in_range & distinct)


def _describe_bad_row(routes: LayerRoutes) -> str:
    row = int(_bad_rows(routes).nonzero()[0])
    ids = routes.ids[row].to(torch.int64).tolist()
    return (
        f"layer {routes.layer}, row {row}: expected {len(ids)} different expert ids in "
        f"[0, {routes.num_experts}), got {ids}"
    )
