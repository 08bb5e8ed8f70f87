"""New weights on their way from the trainer to every engine replica, now and later ones.

A detached holder owns the newest state dict, so that a replica that starts tomorrow comes up
with it although the trainer's own copy is gone. Tensors travel as numpy: torch tensors are
copied twice by Ray, and bfloat16 has no numpy type, so its bits go as uint16.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from serve_app.errors import StoreUnavailable
from serve_app.store.owner.directory import NAMESPACE
from serve_app.store.protocol import PROTOCOL, ask_protocol, check_protocol

if TYPE_CHECKING:
    import torch

_HOLDER = "weights"
WHAT = "weights holder"
"""What it is called where it is refused."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor's bits and its torch dtype's name."""

    bits: npt.NDArray[Any]
    dtype: str


Packed = dict[str, PackedTensor]
Published: TypeAlias = "Packed | list[ray.ObjectRef[Packed]]"
"""Packed weights, or a list with one reference to them (nested, so that Serve keeps it one)."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The holder's weights and their version."""

    weights: "list[ray.ObjectRef[Packed]]"
    version: int


def pack_one(value: "torch.Tensor | npt.NDArray[Any]") -> PackedTensor:
    """Turn a tensor on any device into numpy."""
    import torch

    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return PackedTensor(bits.numpy(), str(tensor.dtype).removeprefix("torch."))


def pack(state: "Mapping[str, torch.Tensor | npt.NDArray[Any]]") -> Packed:
    """Turn a state dict into numpy."""
    return {name: pack_one(value) for name, value in state.items()}


def unpack(weights: Published) -> "dict[str, torch.Tensor]":
    """Turn packed weights back into tensors that share their memory: read, do not write."""
    import torch

    from serve_app.tensors import tensor_over

    packed: Packed = ray.get(weights[0]) if isinstance(weights, list) else weights
    return {
        name: tensor_over(value.bits).view(getattr(torch, value.dtype))
        for name, value in packed.items()
    }


class WeightsHolder:
    """Owns the newest weights of an application; runs as a small detached actor.

    `stage` takes a copy that this actor owns; only `commit` makes it what later replicas load.
    """

    def __init__(self) -> None:
        self._staged: dict[int, Newest] = {}
        self._newest: Newest | None = None

    def r3serve_protocol(self) -> int:
        """Say what this actor understands."""
        return PROTOCOL

    def stage(
        self, weights: "Packed | Mapping[str, torch.Tensor]", version: int
    ) -> "list[ray.ObjectRef[Packed]]":
        """Keep a packed copy and return a reference to it, in a list."""
        packed = {
            name: value if isinstance(value, PackedTensor) else pack_one(value)
            for name, value in weights.items()
        }
        self._staged[version] = Newest([ray.put(packed)], version)
        return self._staged[version].weights

    def commit(self, version: int) -> None:
        """Make staged weights the newest."""
        self._newest = self._staged.pop(version)
        self._staged.clear()

    def discard(self, version: int) -> None:
        """Forget staged weights that no replica took."""
        self._staged.pop(version, None)

    def newest(self) -> Newest | None:
        """Return the newest committed weights."""
        return self._newest


def _name(app: str) -> str:
    return f"{app}/{_HOLDER}"


def open_holder(app: str, timeout_s: float) -> ActorHandle[Any]:
    """Make the application's holder, or find it.

    Raises `StoreUnavailable` if it does not answer in ``timeout_s`` seconds, and `StoreError` if
    another version of r3serve began it.
    """
    actor: Any = ray.remote(WeightsHolder)
    holder: ActorHandle[Any] = actor.options(
        name=_name(app),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy="DEFAULT",  # not in its maker's placement group, which it outlives
    ).remote()
    try:
        check_protocol(ray.get(ask_protocol(holder, WHAT, app), timeout=timeout_s), WHAT, app)
    except RayError as error:
        raise StoreUnavailable(f"the {WHAT} of {app!r} does not answer: {error}") from None
    return holder


async def newest_weights(app: str, timeout_s: float = 30.0) -> Newest | None:
    """Return what a starting replica must load, None if it has the checkpoint's weights.

    Raises `StoreError` if another version of r3serve began the holder, `StoreUnavailable` if it
    does not answer.
    """
    try:
        holder = ray.get_actor(_name(app), namespace=NAMESPACE)
    except ValueError:
        return None
    try:
        async with asyncio.timeout(timeout_s):
            check_protocol(await ask_protocol(holder, WHAT, app), WHAT, app)
            newest: Newest | None = await holder.newest.remote()
    except (TimeoutError, RayError) as error:
        raise StoreUnavailable(f"the {WHAT} of {app!r} does not answer: {error}") from None
    return newest
