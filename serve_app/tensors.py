"""Tensors over numpy arrays that Ray shares read-only."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


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
