"""What `EngineArgs` means to LMDeploy: its engine's config, and what is ours on top of it."""

import dataclasses
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat

from serve_app.config import EngineArgs

if TYPE_CHECKING:
    from lmdeploy import PytorchEngineConfig

LMDEPLOY = "0.18.0"
RAY_WITHOUT_FREE = (2, 59)

# Set by fields of `EngineArgs`, or decided by this adapter.
OURS = {
    "dtype": "dtype",
    "session_len": "context_length",
    "max_batch_size": "max_batch_size",
    "enable_return_routed_experts": "enable_return_routed_experts",
    "enable_transfer_obj_ref": "enable_transfer_obj_ref",
}
REFUSED = {
    "logprobs_mode": "logprobs are always raw ones",
    "enable_mp_engine": "the engine runs in the replica's process",
    "mp_engine_backend": "the engine runs in the replica's process",
    "thread_safe": "LMDeploy 0.18 has it no longer",
    "role": "a replica prefills and decodes",
    "dp_rank": "replicas are Serve's",
    "kv_transfer_config": "a cache outside the engine cannot be flushed at a weight update",
    "enable_eplb": "an update of its experts' placement cannot follow new weights",
    "empty_init": "every replica loads the checkpoint",
    "download_dir": "checkpoints are local",
    "revision": "checkpoints are local",
}


class LmdeployOptions(BaseModel):
    """The part of `EngineArgs.engine_kwargs` that is this adapter's own.

    ``transfer``: who puts a rollout's routes into the store. ``ours``: this process, after the
    engine has answered, off its loop. ``lmdeploy``: LMDeploy itself, into the ``shared_store``
    actor (``store.compat_actors: [lmdeploy]``), blocking its loop; the key is taken over.
    An engine that has work and makes no progress for ``step_timeout_s`` is unhealthy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transfer: Literal["ours", "lmdeploy"] = "ours"
    step_timeout_s: PositiveFloat = 300.0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Both halves of ``engine_kwargs``."""

    own: LmdeployOptions
    engine: dict[str, Any]


def check_installed() -> None:
    """Raise ValueError unless LMDeploy 0.18.0 is installed; importing it takes seconds."""
    try:
        found = version("lmdeploy")
    except PackageNotFoundError:
        raise ValueError(
            f"backend 'lmdeploy' needs lmdeploy=={LMDEPLOY}, which is not installed:"
            " pip install -c constraints/cuda.txt 'r3serve[lmdeploy]'"
        ) from None
    if found != LMDEPLOY:
        raise ValueError(
            f"backend 'lmdeploy' is written for lmdeploy=={LMDEPLOY}, found {found}: its engine's"
            " parts are used by name"
        )


def check_machine(config: "PytorchEngineConfig") -> None:
    """Raise ValueError where there is no GPU; LMDeploy itself would end the process.

    The workers of a Ray executor have GPUs, this process needs none; but it needs a Ray that
    still has ``ray.internal.free``.
    """
    import torch

    if config.distributed_executor_backend == "ray":
        ray = version("ray")
        if tuple(map(int, ray.split(".")[:2])) >= RAY_WITHOUT_FREE:
            raise ValueError(
                "LMDeploy 0.18's Ray executor calls ray.internal.free, which Ray 2.59 removed:"
                f" expected ray<2.59 for tp > 1, found {ray}"
            )
    elif not torch.cuda.device_count():
        raise ValueError(
            "backend 'lmdeploy' needs a CUDA GPU and this process sees none: give its replicas"
            " engine.serve.num_gpus 1 on a node that has one, or use backend 'transformers'"
        )


def split_options(engine_kwargs: dict[str, Any]) -> EngineOptions:
    """Tell this adapter's options from `PytorchEngineConfig`'s; raise ValueError for others."""
    from lmdeploy import PytorchEngineConfig

    own = set(LmdeployOptions.model_fields)
    theirs = {field.name for field in dataclasses.fields(PytorchEngineConfig)}
    known = own | (theirs - set(OURS) - set(REFUSED))
    for name in engine_kwargs:
        if name in OURS:
            raise ValueError(f"engine_kwargs: set engine.{OURS[name]} instead of {name}")
        if name in REFUSED:
            raise ValueError(f"engine_kwargs: {name} cannot be set here: {REFUSED[name]}")
    if unknown := set(engine_kwargs) - known:
        raise ValueError(
            f"engine_kwargs of the lmdeploy backend: expected some of {sorted(known)},"
            f" got {sorted(unknown)}"
        )
    return EngineOptions(
        LmdeployOptions.model_validate({n: v for n, v in engine_kwargs.items() if n in own}),
        {n: v for n, v in engine_kwargs.items() if n not in own},
    )


def engine_config(
    args: EngineArgs, options: EngineOptions, context_length: int
) -> "PytorchEngineConfig":
    """Return LMDeploy's own config; raise ValueError for values that it does not take."""
    from lmdeploy import PytorchEngineConfig

    theirs = dict(options.engine)
    for name in ("dp", "ep"):
        if theirs.get(name, 1) > 1:
            raise ValueError(
                f"engine_kwargs: {name} > 1 is not served: its ranks wait for each other at every"
                f" step and Serve's replicas do not; scale engine.serve.max_replicas, or tp"
            )
    if args.dtype == "float32":
        raise ValueError("LMDeploy runs bfloat16 or float16: expected one of them, got float32")
    tp = theirs.get("tp", 1)
    executor = theirs.pop("distributed_executor_backend", None) or ("ray" if tp > 1 else "uni")
    if executor not in ("uni", "ray") or (executor == "uni" and tp > 1):
        raise ValueError(
            f"distributed_executor_backend must be 'ray', or 'uni' with tp 1, got {executor!r}"
            f" with tp {tp}"
        )
    if theirs.get("quant_policy"):
        from lmdeploy.messages import QuantPolicy

        theirs["quant_policy"] = QuantPolicy(theirs["quant_policy"])
    transfers = args.enable_transfer_obj_ref and options.own.transfer == "lmdeploy"
    try:
        return PytorchEngineConfig(
            dtype=args.dtype,
            session_len=context_length,
            max_batch_size=args.max_batch_size,
            distributed_executor_backend=executor,
            enable_return_routed_experts=args.enable_return_routed_experts,
            enable_transfer_obj_ref=transfers,
            logprobs_mode="raw_logprobs",
            enable_metrics=theirs.pop("enable_metrics", False),
            **theirs,
        )
    except (AssertionError, TypeError) as error:
        raise ValueError(f"engine_kwargs: LMDeploy refuses them: {error}") from error
