"""Configuration: one frozen pydantic model per deployment, unknown keys refused.

The only module that reads the environment.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationInfo,
    model_validator,
)

MODELS_ELSEWHERE = {"models_elsewhere": True}
"""Validation context for a file whose model lies on another machine."""


def _checkpoint(model: str, info: ValidationInfo) -> str:
    if info.context == MODELS_ELSEWHERE:
        return model
    path = Path(model).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"expected a local Hugging Face checkpoint directory (with config.json), got {model!r}"
            f" (relative to {os.getcwd()})"
        )
    return str(path.resolve())


class _Args(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeOptions(_Args):
    """How Serve runs one deployment: replicas, autoscaling on ongoing requests, resources.

    ``placement_group_bundles`` reserves resources for each replica (in the first bundle, which
    holds its ``num_cpus``) and for the workers that its engine starts, all on one node.
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

    @property
    def gpus_per_replica(self) -> float:
        """GPUs that a replica and its workers take."""
        return self.num_gpus + sum(each.get("GPU", 0) for each in self.placement_group_bundles)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self

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
            bundles = [dict(each) for each in self.placement_group_bundles]
            options["placement_group_bundles"] = bundles
            options["placement_group_strategy"] = "STRICT_PACK"
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


class EngineArgs(_Args):
    """The inference engine.

    ``enable_return_routed_experts``: record the experts of every token of requests that ask.
    ``enable_transfer_obj_ref``: answer with a key instead of the array. Independent switches;
    the second without the first is refused. ``context_length=None`` takes the model's own.
    ``engine_kwargs`` goes to the backend's own constructor, checked there by name.
    """

    backend: Literal["transformers", "lmdeploy"] = "transformers"
    model: Annotated[str, AfterValidator(_checkpoint)]
    enable_return_routed_experts: bool = False
    enable_transfer_obj_ref: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_batch_size: Annotated[int, Field(ge=1)] = 16
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    context_length: Annotated[int, Field(ge=2)] | None = None
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    serve: ServeOptions = ServeOptions(num_cpus=0.5, max_ongoing_requests=256)

    @model_validator(mode="after")
    def _transfer_needs_routes(self) -> Self:
        if self.enable_transfer_obj_ref and not self.enable_return_routed_experts:
            raise ValueError(
                "enable_transfer_obj_ref sends routed experts by key, but"
                " enable_return_routed_experts is off: set both, or neither"
            )
        return self


CompatNamespace = Literal["lmdeploy", "sglang"]
"""Where an upstream engine looks for its ``shared_store``."""


class StoreArgs(_Args):
    """The expert store. ``byte_budget`` is per shard; None takes half its node's object store.

    ``backend="memory"`` keeps records in the calling process, for Serve's local testing mode.
    Shards that hold nothing leave ``leave_after_s`` after their application is gone.
    ``compat_actors`` names the namespaces to offer upstream's ``shared_store`` in; a key that is
    read through it ends ``compat_grace_s`` later.
    """

    backend: Literal["shards", "memory"] = "shards"
    byte_budget: Annotated[int, Field(ge=1)] | None = None
    lease_s: Annotated[float, Field(gt=0)] = 3600.0
    put_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    call_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    leave_after_s: Annotated[float, Field(gt=0)] = 60.0
    compat_actors: tuple[CompatNamespace, ...] = ()
    compat_grace_s: Annotated[float, Field(gt=0)] = 30.0
    serve: ServeOptions = ServeOptions(num_cpus=0.05)

    @model_validator(mode="after")
    def _compat_needs_shards(self) -> Self:
        if self.compat_actors and self.backend == "memory":
            raise ValueError(
                "compat_actors read from shards, but backend is 'memory': set backend 'shards',"
                " or no compat_actors"
            )
        return self


class DecoderArgs(_Args):
    """The decoder: turns keys into tensors next to the data.

    A call goes to a replica on the node that holds its bytes; while those that there are have no
    room it waits ``near_wait_s`` before it takes one elsewhere. ``max_answer_bytes`` bounds one
    answer; None takes the size of its node's object store.
    """

    near_wait_s: Annotated[float, Field(ge=0)] = 2.0
    max_answer_bytes: Annotated[int, Field(ge=1)] | None = None
    serve: ServeOptions = ServeOptions(
        max_replicas=2, target_ongoing_requests=2, max_ongoing_requests=8
    )


class IngressArgs(_Args):
    """The HTTP edge.

    Without ``api_keys`` everybody may sample, without ``admin_keys`` too everybody may do the
    rest; with ``api_keys`` alone nobody may change weights, sleep or abort. Key files have a key
    a line and keep keys out of Serve's own config and dashboard. From ``open_networks`` xtuner's
    ``/abort_request`` and ``/terminate`` are taken without a key. ``allow_pickle`` lets
    ``/update_weights`` unpickle what it is sent, which runs the sender's code.

    ``max_sampling`` bounds what one replica samples at once (None: three quarters of
    ``serve.max_ongoing_requests``), ``max_per_key`` and ``requests_per_s_per_key`` what one key
    does there; ``max_buffered_bytes`` the request bodies in memory. ``max_answer_bytes`` is the
    most that one fetch answers with.
    """

    model_name: str | None = None
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    control_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    api_keys: tuple[SecretStr, ...] = ()
    api_keys_file: Path | None = None
    admin_keys: tuple[SecretStr, ...] = ()
    admin_keys_file: Path | None = None
    open_networks: tuple[IPvAnyNetwork, ...] = ()
    allow_pickle: bool = False
    max_body_bytes: Annotated[int, Field(ge=1)] = 16 << 20
    max_weights_bytes: Annotated[int, Field(ge=1)] = 256 << 20
    max_buffered_bytes: Annotated[int, Field(ge=1)] = 512 << 20
    body_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_headers: Annotated[int, Field(ge=1)] = 128
    max_sampling: Annotated[int, Field(ge=1)] | None = None
    max_per_key: Annotated[int, Field(ge=1)] | None = None
    requests_per_s_per_key: Annotated[float, Field(gt=0)] | None = None
    max_answer_bytes: Annotated[int, Field(ge=1)] = 256 << 20
    access_log: bool = True
    serve: ServeOptions = ServeOptions(
        num_cpus=0.1, max_ongoing_requests=512, max_queued_requests=1024
    )

    @property
    def sampling_limit(self) -> int:
        """How many requests one replica samples at once; the rest is for aborts and health."""
        return self.max_sampling or max(1, self.serve.max_ongoing_requests * 3 // 4)

    @model_validator(mode="after")
    def _room_for_control(self) -> Self:
        if self.max_sampling and self.max_sampling >= self.serve.max_ongoing_requests:
            raise ValueError(
                f"max_sampling {self.max_sampling} leaves no room for aborts and health checks:"
                f" expected less than serve.max_ongoing_requests {self.serve.max_ongoing_requests}"
            )
        return self


class ProxyArgs(_Args):
    """What `serve_app.ingress.proxy` lets Serve's own HTTP proxy bear with, on every node.

    ``stall_s`` is how long a client may read nothing before its request is aborted. A field is
    set by an environment variable, ``R3SERVE_PROXY_STALL_S`` for one: the proxy belongs to the
    cluster, not to an application.
    """

    max_body_bytes: Annotated[int, Field(ge=1)] = 256 << 20
    max_headers: Annotated[int, Field(ge=1)] = 128
    stall_s: Annotated[float, Field(gt=0)] = 60.0


class RolloutArgs(_Args):
    """What `graphs.rollout:build` takes."""

    engine: EngineArgs
    store: StoreArgs = StoreArgs()
    decoder: DecoderArgs = DecoderArgs()
    ingress: IngressArgs = IngressArgs()


class StoreGraphArgs(_Args):
    """What `graphs.store:build` takes."""

    store: StoreArgs = StoreArgs()
    decoder: DecoderArgs = DecoderArgs()


def read_args(config: Path) -> dict[str, Any]:
    """Return the builder's arguments of the first application in a Serve config file."""
    args: dict[str, Any] = yaml.safe_load(config.read_text())["applications"][0]["args"]
    return args


def proxy_args() -> ProxyArgs:
    """Return the proxy's limits as this process's environment sets them."""
    variables = {f"R3SERVE_PROXY_{name.upper()}": name for name in ProxyArgs.model_fields}
    given = {name: os.environ[key] for key, name in variables.items() if key in os.environ}
    return ProxyArgs.model_validate(given)


def ray_environment() -> dict[str, str]:
    """Return the environment variables that change what Ray does."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
