"""LMDeploy's Ray executor, for tensor parallelism: its workers are actors beside the replica.

Imports LMDeploy's part that imports Ray: load it when that executor is chosen.
"""

import base64
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lmdeploy.pytorch.engine.executor import ray_executor
from lmdeploy.pytorch.ray import RayContext, ray
from lmdeploy.serve.openai.protocol import UpdateParamsRequest

Bucket = list[tuple[str, torch.Tensor]]

_BUCKET_BYTES = 256 << 20


class BorrowedRay(RayContext):  # type: ignore[misc]  # lmdeploy is untyped
    """Leaves Ray alone: LMDeploy's own ends the replica's connection when an engine ends."""

    def shutdown(self) -> None:
        """Give back the placement group, if LMDeploy had to make one."""
        if self.owned_pg:
            ray.util.remove_placement_group(self.placement_group)


def borrow_ray() -> None:
    """Make executors built from now on use `BorrowedRay`, also where building them fails."""
    ray_executor.RayContext = BorrowedRay


def update_requests(buckets: Iterator[Bucket]) -> Iterator[UpdateParamsRequest]:
    """Yield weights in the form that LMDeploy's workers take, the last one marked.

    A pickled function with arguments makes each tensor; LMDeploy puts the device into the
    seventh of them.
    """
    waiting: list[tuple[str, Any]] = []
    nbytes = 0
    for bucket in buckets:
        for name, tensor in bucket:
            if waiting and nbytes + tensor.nbytes > _BUCKET_BYTES:
                yield _request(waiting, finished=False)
                waiting, nbytes = [], 0
            waiting.append((name, (rebuild, (*_packed(tensor), None, None, None, None, None))))
            nbytes += tensor.nbytes
    yield _request(waiting, finished=True)


def rebuild(bits: npt.NDArray[Any], dtype: str, *rest: Any) -> torch.Tensor:
    """Make a tensor on the worker's device, which is the last argument."""
    return torch.from_numpy(bits.copy()).view(getattr(torch, dtype)).to(rest[-1])


def _packed(tensor: torch.Tensor) -> tuple[npt.NDArray[Any], str]:
    tensor = tensor.detach().cpu().contiguous()
    narrow = tensor.dtype == torch.bfloat16  # numpy has no such dtype
    bits = tensor.view(torch.int16) if narrow else tensor
    return np.asarray(bits), str(tensor.dtype).removeprefix("torch.")


def _request(named: list[tuple[str, Any]], *, finished: bool) -> UpdateParamsRequest:
    data = base64.b64encode(pickle.dumps(named, protocol=5)).decode()
    return UpdateParamsRequest(serialized_named_tensors=data, finished=finished)
