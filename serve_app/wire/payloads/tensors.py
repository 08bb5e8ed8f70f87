"""Tensors of torch, told and read without loading torch: who has one has loaded it."""

import sys
from typing import Any, Protocol, TypeGuard

import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.wire.payloads.refusal import no_rows

_INTEGERS = frozenset(f"torch.{name}{bits}" for name in ("int", "uint") for bits in (8, 16, 32, 64))


class Tensor(Protocol):
    """What is asked of a ``torch.Tensor``."""

    @property
    def dtype(self) -> Any:
        """Type of the values."""

    @property
    def shape(self) -> Any:
        """Sizes."""

    def cpu(self) -> Any:
        """Return it in the memory of the process."""


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Tell a ``torch.Tensor``."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def on_cpu(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor of integers as an array, brought from its device if it lies on one.

    Shares the memory of one that does not. Raises `RecordError` for other values, and for tensors
    that have none to read, such as sparse ones.
    """
    try:
        shape = list(tensor.shape)
        if shape and not shape[0]:
            raise no_rows(shape)
        if str(tensor.dtype) not in _INTEGERS:
            raise RecordError(f"expected integer ids, got {tensor.dtype}{shape}")
        ids: npt.NDArray[Any] = tensor.cpu().numpy()
    except (RuntimeError, TypeError) as error:
        raise RecordError(f"expected a tensor that numpy can read, got {str(error)[:80]}") from None
    return ids
