"""How Serve runs one deployment: replicas, autoscaling, resources, and where they must lie."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Strategy = Literal["STRICT_PACK", "PACK"]

NODE_GPUS = 8
"""GPUs of the largest usual node: what has more of them is spread over nodes."""


class Args(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeOptions(Args):
    """How Serve runs one deployment: replicas, autoscaling on ongoing requests, resources.

    ``placement_group_bundles`` reserves resources for each replica (in the first bundle, which
    holds its ``num_cpus``) and for the workers that its engine starts. An engine's are worked out
    from its ``engine_kwargs``, see `EngineArgs.placed`. ``placement_group_strategy`` lays them on
    one node (``STRICT_PACK``) or on as few as it takes (``PACK``); None is the first for up to
    `NODE_GPUS` GPUs, the second for more.
    """

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 64
    max_queued_requests: Annotated[int, Field(ge=-1)] = -1
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    num_gpus: Annotated[float, Field(ge=0)] = 0
    placement_group_bundles: tuple[dict[str, Annotated[float, Field(gt=0)]], ...] = ()
    placement_group_strategy: Strategy | None = None
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 20

    @model_validator(mode="after")
    def _fits_first_bundle(self) -> Self:
        first = self.placement_group_bundles[:1]
        if first and (self.num_gpus or first[0].get("CPU", 0) < self.num_cpus):
            raise ValueError(
                f"the first of placement_group_bundles is the replica's own: expected num_gpus 0"
                f" and at least CPU {self.num_cpus:g} in it, got num_gpus {self.num_gpus:g} and"
                f" {first[0]}"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What a replica takes, each of them on one node."""
        if self.placement_group_bundles:
            return [dict(each) for each in self.placement_group_bundles]
        own = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return [{kind: amount for kind, amount in own.items() if amount}]

    @property
    def gpus_per_replica(self) -> float:
        """GPUs that a replica and its workers take."""
        return sum(each.get("GPU", 0) for each in self.bundles)

    @property
    def cpus_per_replica(self) -> float:
        """CPUs that a replica and its workers take."""
        return sum(each.get("CPU", 0) for each in self.bundles)

    @property
    def strategy(self) -> Strategy:
        """Whether the bundles of a replica lie on one node, or may span several."""
        if self.placement_group_strategy is not None:
            return self.placement_group_strategy
        return "STRICT_PACK" if self.gpus_per_replica <= NODE_GPUS else "PACK"

    def deployment(self) -> dict[str, Any]:
        """Return the keyword arguments that `serve.deployment` takes."""
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }
        if self.max_replicas_per_node is not None:
            options["max_replicas_per_node"] = self.max_replicas_per_node
        if self.placement_group_bundles:
            options["placement_group_bundles"] = self.bundles
        if self.placement_group_bundles or self.placement_group_strategy is not None:
            options["placement_group_strategy"] = self.strategy  # Serve refuses it without bundles
        if self.min_replicas == self.max_replicas:
            return {"num_replicas": self.max_replicas, **options}
        scaling = {
            "min_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_ongoing_requests,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }
        return {"autoscaling_config": scaling, **options}
