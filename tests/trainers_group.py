"""A trainer's side of a process group that engine replicas join: rank 0, over gloo."""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous


def open_as_rank_0(port: int, name: str, world_size: int) -> Any:
    """Open the group; returns once all of its ranks are there."""
    store, _, _ = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size))
    trainer, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        backend_options=None,
        timeout=timedelta(seconds=60),
    )
    c10d._world.pg_group_ranks[trainer] = {rank: rank for rank in range(world_size)}
    return trainer


def broadcast(trainer: Any, named: list[tuple[str, torch.Tensor]]) -> None:
    """Send tensors to all ranks, one by one."""
    for _, value in named:
        torch.distributed.broadcast(value.contiguous(), src=0, group=trainer)
