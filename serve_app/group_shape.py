"""How many GPUs an engine group takes, and who of them is whose; pure arithmetic, no LMDeploy.

LMDeploy 0.18's own rules (`lmdeploy.pytorch.config.DistConfig`): ``ep`` above 1 is the number of
all GPUs, else ``tp`` is (the widest of it, ``mlp_tp_size`` and ``moe_tp_size`` where ``dp`` is
above 1); each of ``dp`` engines drives an equal share of them with tensor parallel attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CPUS_PER_GPU = 1.0
NAMES = ("tp", "dp", "ep", "attn_tp_size", "mlp_tp_size", "moe_tp_size")


@dataclass(frozen=True, slots=True)
class GroupShape:
    """``ranks`` engines that step together, each with ``workers`` processes of one GPU."""

    ranks: int = 1
    workers: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the whole group."""
        return self.ranks * self.workers

    @property
    def alone(self) -> bool:
        """One GPU, driven by the replica's own process."""
        return self.gpus == 1

    def bundles(self, driver_cpus: float) -> list[dict[str, float]]:
        """Return the placement group of a replica: its driver's bundle, then one a GPU."""
        gpu = {"GPU": 1.0, "CPU": CPUS_PER_GPU}
        return [{"CPU": max(driver_cpus, 0.01)}, *(dict(gpu) for _ in range(self.gpus))]


def group_shape(engine_kwargs: Mapping[str, Any]) -> GroupShape:
    """Return the shape that LMDeploy's sizes make; raise ValueError where they do not fit."""
    sizes = {name: _size(engine_kwargs, name) for name in NAMES}
    dp, ep, tp = sizes["dp"] or 1, sizes["ep"] or 1, sizes["tp"] or 1
    mlp = (sizes["mlp_tp_size"] if dp > 1 else None) or tp
    moe = (sizes["moe_tp_size"] if dp > 1 else None) or (1 if ep > 1 else mlp)
    gpus = ep if ep > 1 else max(mlp, moe)
    given = sizes_given(engine_kwargs)
    for name, size in (("dp", dp), ("mlp tp", mlp), ("moe tp", moe)):
        if gpus % size:
            raise ValueError(
                f"engine_kwargs: expected {name} to divide the {gpus} GPUs of the group"
                f" (ep, or else the widest tp), got {given}"
            )
    workers = gpus // dp
    attention = (sizes["attn_tp_size"] if dp > 1 else None) or workers
    if attention != workers:
        raise ValueError(
            f"engine_kwargs: expected attn_tp_size {workers}, as {gpus} GPUs of {dp} ranks have it,"
            f" got {given}"
        )
    for name, size in (("mlp tp", mlp), ("moe tp", moe)):
        if size > 1 and size % attention:
            raise ValueError(
                f"engine_kwargs: expected {name} to be a multiple of the {attention} GPUs that a"
                f" rank's attention is on, got {given}"
            )
    return GroupShape(dp, workers)


def sizes_given(engine_kwargs: Mapping[str, Any]) -> str:
    """Name the sizes as they stand in the configuration: ``dp 8, ep 8``."""
    sizes = {name: engine_kwargs.get(name) for name in NAMES}
    return ", ".join(f"{name} {value}" for name, value in sizes.items() if value) or "none"


def _size(engine_kwargs: Mapping[str, Any], name: str) -> int | None:
    value = engine_kwargs.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"engine_kwargs: expected {name} to be a whole number > 0, got {value!r}")
    return value
