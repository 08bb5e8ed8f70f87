"""Weights that come in parts, as LMDeploy's clients send them: pickled, or through a group.

A part is some named tensors; after the last one the whole is checked and served. The wire forms
are LMDeploy 0.18's: base64 of a pickled list of (name, tensor or rebuild function with its
arguments), or of one flattened tensor and where each tensor lies in it; and broadcasts from rank
0 of a torch process group that the trainer opens.
"""

import base64
import binascii
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from serve_app.errors import InvalidRequest, WeightsMismatch

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

Named = Iterable[tuple[str, "torch.Tensor"]]
_FLAT = "flattened_bucket"
_DEVICE_ARGUMENT = 6  # of torch's rebuild_cuda_tensor


@dataclass(frozen=True, slots=True)
class PickledPart:
    """Base64 of a pickle, or one for each worker; ``load_format``: None or ``flattened_bucket``."""

    data: str | Sequence[str]
    load_format: str | None = None


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A process group that the trainer is rank 0 of; GPU *i* becomes ``rank_offset`` + *i*.

    GPUs are counted through all replicas, in the order of their names, and through each one's
    workers in the order of their ranks; a replica without workers counts as one.
    """

    address: str
    port: int
    rank_offset: int
    world_size: int
    name: str
    backend: str


@dataclass(frozen=True, slots=True)
class BroadcastPart:
    """Tensors that rank 0 of a group is about to broadcast, one by one or as one flat tensor."""

    group: str
    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    load_format: str | None = None


class Inbox(Protocol):
    """Collects one replica's parts. Its methods block: call them in a thread."""

    @property
    def ranks(self) -> int:
        """How many ranks of a trainer's group this replica is."""
        ...

    def unpickle(self, part: PickledPart) -> int:
        """Add a pickled part; this runs whatever code its sender put into it."""
        ...

    def join(self, spec: GroupSpec, index: int, timeout_s: float) -> None:
        """Join a group as its GPUs from ``index`` on; returns once all its ranks have."""
        ...

    def leave(self, name: str) -> None:
        """Leave a group."""
        ...

    def receive(self, part: BroadcastPart) -> int:
        """Add what rank 0 broadcasts."""
        ...

    def take(self) -> "dict[str, torch.Tensor]":
        """Return all that came so far, and begin anew."""
        ...


class WeightsInbox:
    """Collects in this process; see `Inbox`."""

    ranks = 1

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._groups: dict[str, ProcessGroup] = {}

    def unpickle(self, part: PickledPart) -> int:
        """Add a pickled part; this runs whatever code its sender put into it."""
        parts = [part.data] if isinstance(part.data, str) else part.data
        if len(parts) != 1:
            raise InvalidRequest(
                f"expected one pickled part, as this replica has one process, got {len(parts)}"
            )
        try:
            loaded = pickle.loads(base64.b64decode(parts[0], validate=True))
            return self._add(_flat(loaded) if part.load_format == _FLAT else _rebuilt(loaded))
        except binascii.Error as error:
            raise InvalidRequest(f"expected base64, got {error}") from None
        except Exception as error:
            raise InvalidRequest(
                f"expected pickled named tensors: {type(error).__name__}: {str(error)[:200]}"
            ) from error

    def join(self, spec: GroupSpec, index: int, timeout_s: float) -> None:
        """Join a group; returns once all its ranks have."""
        if spec.name in self._groups:
            raise InvalidRequest(f"group {spec.name!r} already initialized")
        self._groups[spec.name] = _joined(spec, spec.rank_offset + index, timeout_s)

    def leave(self, name: str) -> None:
        """Leave a group."""
        import torch.distributed as dist

        dist.destroy_process_group(self._group(name))
        del self._groups[name]

    def receive(self, part: BroadcastPart) -> int:
        """Add what rank 0 broadcasts."""
        import torch

        group = self._group(part.group)
        if not len(part.names) == len(part.dtypes) == len(part.shapes):
            raise InvalidRequest("expected as many names as dtypes and shapes")
        dtypes = [getattr(torch, name.removeprefix("torch."), None) for name in part.dtypes]
        if odd := [name for name, dtype in zip(part.dtypes, dtypes, strict=True) if dtype is None]:
            raise InvalidRequest(f"expected torch dtypes, got {odd[0]!r}")
        device = "cuda" if "nccl" in str(group.name()).lower() else "cpu"
        tensors = [
            torch.empty(list(shape), dtype=dtype, device=device)
            for shape, dtype in zip(part.shapes, dtypes, strict=True)
        ]
        if part.load_format == _FLAT and tensors:
            flat = torch.empty(
                sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device=device
            )
            _broadcast(group, flat)
            pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
            tensors = [piece.view_as(one) for piece, one in zip(pieces, tensors, strict=True)]
        else:
            for tensor in tensors:
                _broadcast(group, tensor)
        return self._add(zip(part.names, tensors, strict=True))

    def take(self) -> "dict[str, torch.Tensor]":
        """Return all that came so far, and begin anew."""
        tensors, self._tensors = self._tensors, {}
        if not tensors:
            raise WeightsMismatch("expected weights before the end of the update, got none")
        return tensors

    def clear(self) -> None:
        """Drop what came so far."""
        self._tensors.clear()

    def _add(self, named: Named) -> int:
        added = dict(named)
        self._tensors.update(added)
        return len(added)

    def _group(self, name: str) -> "ProcessGroup":
        if name not in self._groups:
            raise InvalidRequest(f"group {name!r} not initialized")
        return self._groups[name]


def _rebuilt(loaded: Any) -> Named:
    """Clone what lies in its sender's memory: the sender may use it again."""
    for name, item in loaded:
        yield name, _tensor(item).clone()


def _flat(loaded: Any) -> Named:
    flat = _tensor(loaded["flattened_tensor"])
    for meta in loaded["metadata"]:
        piece = flat[meta.start_idx : meta.end_idx]
        yield meta.name, piece.view(meta.dtype).reshape(meta.shape).clone()


def _tensor(item: Any) -> "torch.Tensor":
    import torch

    if isinstance(item, torch.Tensor):
        return item
    rebuild, arguments = item
    arguments = list(arguments)
    if rebuild.__name__ == "rebuild_cuda_tensor":
        arguments[_DEVICE_ARGUMENT] = torch.cuda.current_device()
    tensor: torch.Tensor = rebuild(*arguments)
    return tensor


def _joined(spec: GroupSpec, rank: int, timeout_s: float) -> "ProcessGroup":
    """Open a group beside the process's own, as trainers' frameworks do, prefixes and all."""
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_s)
    where = f"tcp://{spec.address}:{spec.port}"
    try:
        store, rank, world_size = next(rendezvous(where, rank, spec.world_size, timeout=timeout))
        store.set_timeout(timeout)
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            c10d.Backend(spec.backend),
            c10d.PrefixStore(spec.name, store),
            group_name=c10d.GroupName(spec.name),
            backend_options=None,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise InvalidRequest(
            f"cannot join {spec.name!r} as rank {rank} of {spec.world_size}: {str(error)[:200]}"
        ) from None
    assert isinstance(group, c10d.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {each: each for each in range(world_size)}
    return group


def _broadcast(group: "ProcessGroup", tensor: "torch.Tensor") -> None:
    import torch.distributed as dist

    dist.broadcast(tensor, src=0, group=group)
