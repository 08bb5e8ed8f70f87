"""Configuration: one frozen pydantic model per deployment, unknown keys refused.

The only module that reads the environment.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationInfo,
    model_validator,
)

from serve_app.group_shape import GroupShape, group_shape, sizes_given
from serve_app.serve_options import Args, ServeOptions

HEALTH_CHECK_S = 2.0
"""Serve replaces an engine after three checks that fail; its own period is 10 s."""

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


class EngineArgs(Args):
    """The inference engine.

    ``enable_return_routed_experts``: record the experts of every token of requests that ask.
    ``enable_transfer_obj_ref``: answer with a key instead of the array. Independent switches;
    the second without the first is refused. ``context_length=None`` takes the model's own.
    ``engine_kwargs`` goes to the backend's own constructor, checked there by name; its ``tp``,
    ``dp`` and ``ep`` make each replica a group of GPUs, see `GroupShape`. What sizes an engine
    (``max_batch_size``, ``max_waiting``, ``num_gpu_blocks`` and others in ``engine_kwargs``) is
    for each of a group's ``dp`` ranks; ``serve`` counts groups.
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

    @model_validator(mode="after")
    def _group_has_its_places(self) -> Self:
        group, serve = self.group, self.serve
        if group.alone:
            if serve.placement_group_strategy and not serve.placement_group_bundles:
                raise ValueError(
                    f"serve.placement_group_strategy {serve.placement_group_strategy} places the"
                    f" GPUs of a group, but this engine has one process: set engine_kwargs tp, or"
                    f" dp and ep, or no strategy"
                )
            return self
        sizes = sizes_given(self.engine_kwargs)
        if serve.num_gpus:
            raise ValueError(
                f"expected serve.num_gpus 0, got {serve.num_gpus:g}: with {sizes} the replica's own"
                f" process takes no GPU, its {group.gpus} workers take one each"
            )
        if serve.max_replicas_per_node is not None:
            raise ValueError(
                f"serve.max_replicas_per_node {serve.max_replicas_per_node} cannot be kept with"
                f" {sizes}: Serve places a group by its GPUs alone; leave it out"
            )
        gpus = [bundle.get("GPU", 0) for bundle in self.placed.bundles]
        if gpus[0] or sorted(filter(None, gpus)) != [1.0] * group.gpus:
            raise ValueError(
                f"{sizes} takes {group.gpus} GPUs: expected serve.placement_group_bundles to be the"
                f" driver's without a GPU, then {group.gpus} with GPU 1, got"
                f" {len(list(filter(None, gpus)))} with GPUs:"
                f" {list(serve.placement_group_bundles)}; left out, they are worked out"
            )
        return self

    @property
    def group(self) -> GroupShape:
        """The GPUs that step together as one replica."""
        if self.backend == "lmdeploy":
            return group_shape(self.engine_kwargs)
        return GroupShape()

    @property
    def placed(self) -> ServeOptions:
        """The Serve options, with the bundles that a group needs where none are given."""
        if self.group.alone or self.serve.placement_group_bundles:
            return self.serve
        bundles = tuple(self.group.bundles(self.serve.num_cpus))
        return self.serve.model_copy(update={"placement_group_bundles": bundles})

    @property
    def gpus_per_replica(self) -> float:
        """GPUs that a replica and its workers take."""
        return self.placed.gpus_per_replica

    def deployment(self) -> dict[str, Any]:
        """Return the keyword arguments that `serve.deployment` takes for the engine."""
        return {"health_check_period_s": HEALTH_CHECK_S, **self.placed.deployment()}


CompatNamespace = Literal["lmdeploy", "sglang"]
"""Where an upstream engine looks for its ``shared_store``."""


class StoreArgs(Args):
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


class DecoderArgs(Args):
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


class IngressArgs(Args):
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


class ProxyArgs(Args):
    """What `serve_app.ingress.proxy` lets Serve's own HTTP proxy bear with, on every node.

    ``stall_s`` is how long a client may read nothing before its request is aborted. A field is
    set by an environment variable, ``R3SERVE_PROXY_STALL_S`` for one: the proxy belongs to the
    cluster, not to an application.
    """

    max_body_bytes: Annotated[int, Field(ge=1)] = 256 << 20
    max_headers: Annotated[int, Field(ge=1)] = 128
    stall_s: Annotated[float, Field(gt=0)] = 60.0


class RolloutArgs(Args):
    """What `graphs.rollout:build` takes."""

    engine: EngineArgs
    store: StoreArgs = StoreArgs()
    decoder: DecoderArgs = DecoderArgs()
    ingress: IngressArgs = IngressArgs()


class StoreGraphArgs(Args):
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
