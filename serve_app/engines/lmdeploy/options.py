"""What `EngineArgs` means to LMDeploy: its engine's config, and what is ours on top of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat

from serve_app.config import EngineArgs

if TYPE_CHECKING:
    from lmdeploy import PytorchEngineConfig

LMDEPLOY = "0.18.0"

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
    "dp_rank": "the ranks of a group are numbered here",
    "kv_transfer_config": "a cache outside the engine cannot be flushed at a weight update",
    "enable_eplb": "an update of its experts' placement cannot follow new weights",
    "empty_init": "every replica loads the checkpoint",
    "speculative_config": (
        "the rows of accepted tokens are kept, but no engine with drafts has run on a GPU yet,"
        " and most keep their drafts' old weights after an update"
    ),
    "download_dir": "checkpoints are local",
    "revision": "checkpoints are local",
}


class LmdeployOptions(BaseModel):
    """The part of `EngineArgs.engine_kwargs` that is this adapter's own.

    ``transfer``: who puts a rollout's routes into the store. ``ours``: this process, after the
    engine has answered, off its loop. ``lmdeploy``: LMDeploy itself, into the ``shared_store``
    actor (``store.compat_actors: [lmdeploy]``), blocking its loop; the key is taken over.
    An engine that has work and makes no progress for ``step_timeout_s`` is unhealthy; so is a group
    with a process that gives no sign of life for ``liveness_timeout_s``, or is not up after
    ``start_timeout_s``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transfer: Literal["ours", "lmdeploy"] = "ours"
    step_timeout_s: PositiveFloat = 300.0
    start_timeout_s: PositiveFloat = 1800.0
    liveness_timeout_s: PositiveFloat = 10.0


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

    The workers of a Ray executor have GPUs, this process needs none.
    """
    import torch

    if config.distributed_executor_backend != "ray" and not torch.cuda.device_count():
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
        split_own(engine_kwargs), {n: v for n, v in engine_kwargs.items() if n not in own}
    )


def split_own(engine_kwargs: Mapping[str, Any]) -> LmdeployOptions:
    """Return this adapter's own options, without a look at the others or at LMDeploy."""
    own = LmdeployOptions.model_fields
    return LmdeployOptions.model_validate({n: v for n, v in engine_kwargs.items() if n in own})


def engine_config(
    args: EngineArgs, options: EngineOptions, context_length: int, dp_rank: int = 0
) -> "PytorchEngineConfig":
    """Return LMDeploy's own config; raise ValueError for values that it does not take."""
    from lmdeploy import PytorchEngineConfig

    theirs = dict(options.engine)
    if args.dtype == "float32":
        raise ValueError("LMDeploy runs bfloat16 or float16: expected one of them, got float32")
    gpus = args.group.gpus
    executor = theirs.pop("distributed_executor_backend", None) or ("ray" if gpus > 1 else "uni")
    if executor not in ("uni", "ray") or (executor == "uni" and gpus > 1):
        raise ValueError(
            f"distributed_executor_backend must be 'ray', or 'uni' for one GPU, got {executor!r}"
            f" for {gpus}"
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
            dp_rank=dp_rank,
            enable_metrics=theirs.pop("enable_metrics", False),
            **theirs,
        )
    except (AssertionError, TypeError) as error:
        raise ValueError(f"engine_kwargs: LMDeploy refuses them: {error}") from error
