"""Weights on their way into the workers: in buckets through shared memory, the last one marked."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Bucket = list[tuple[str, torch.Tensor]]
Packed = list[tuple[str, npt.NDArray[Any], str]]

_BUCKET_BYTES = 256 << 20


def packed_buckets(buckets: Iterable[Bucket]) -> Iterator[tuple[Packed, bool]]:
    """Yield named arrays and whether they are the last; few large ones rather than many small."""
    waiting: Packed = []
    nbytes = 0
    for bucket in buckets:
        for name, tensor in bucket:
            if waiting and nbytes + tensor.nbytes > _BUCKET_BYTES:
                yield waiting, False
                waiting, nbytes = [], 0
            waiting.append((name, *_packed(tensor)))
            nbytes += tensor.nbytes
    yield waiting, True


def load_bucket(worker: Any, bucket: Packed, last: bool) -> None:
    """Load named arrays into a worker's model."""
    agent = worker.model_agent
    with torch.inference_mode(), agent.all_context():
        agent._load_updated_weight_bucket(
            [(name, _tensor(bits, dtype)) for name, bits, dtype in bucket], "update_weights"
        )
        if last:
            agent._finalize_updated_weights()


def forget_weights(worker: Any) -> None:
    """Drop the weights of a worker that sleeps: sleep level 2 after level 1."""
    agent = worker.model_agent
    for model in filter(None, (agent.patched_model.get_model(), agent.spec_agent.get_model())):
        model.to(device="meta")


def _packed(tensor: torch.Tensor) -> tuple[npt.NDArray[Any], str]:
    tensor = tensor.detach().cpu().contiguous()
    narrow = tensor.dtype == torch.bfloat16  # numpy has no such dtype
    bits = tensor.view(torch.int16) if narrow else tensor
    return np.asarray(bits), str(tensor.dtype).removeprefix("torch.")


def _tensor(bits: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(getattr(torch, dtype))
