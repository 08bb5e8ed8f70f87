"""Tensors over numpy arrays that Ray shares read-only."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return a new array, page-locked where CUDA is, so that copies to the device overlap."""
    if not torch.cuda.is_available():
        return np.empty(shape, dtype)
    like = torch.from_numpy(np.empty(0, dtype)).dtype
    array: npt.NDArray[Any] = torch.empty(shape, dtype=like, pin_memory=True).numpy()
    return array


def tensor_over(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor on the array's own memory, read-only arrays included; copies nothing.

    torch has no read-only tensors and warns of such arrays. Whoever gets this tensor must not
    write to it if others read the array.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    array = np.ascontiguousarray(array)
    memory: Any = (ctypes.c_byte * array.nbytes).from_address(array.ctypes.data)
    memory.owner = array  # keeps the array as long as the tensor
    return torch.from_numpy(np.frombuffer(memory, array.dtype).reshape(array.shape))
