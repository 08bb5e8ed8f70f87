"""What weights a served model takes: checked as a whole before anything is overwritten."""

from collections.abc import Mapping

import torch
from torch import nn

from serve_app.errors import WeightsMismatch

NAMES_SHOWN = 5


class WeightSpec:
    """The names and shapes that a model's weights have.

    ``load_state_dict`` is not atomic (it overwrites what fits before it raises about the
    rest), hence the check before it.
    """

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        by_memory: dict[int, set[str]] = {}
        for name, tensor in state.items():
            if tensor.numel():  # all empty tensors have the same address, and all meta ones
                where = id(tensor) if tensor.is_meta else tensor.data_ptr()
                by_memory.setdefault(where, set()).add(name)
        self._tied = {name: {name} for name in state}
        self._tied |= {name: names for names in by_memory.values() for name in names}

    def check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise `WeightsMismatch` unless ``state`` has exactly these names and shapes.

        Of tied weights, one name is enough.
        """
        problems = []
        missing = [name for name in self._shapes if self._tied[name].isdisjoint(state)]
        if missing:
            problems.append(f"missing: {_some(missing)}")
        unknown = [name for name in state if name not in self._shapes]
        if unknown:
            problems.append(f"unknown: {_some(unknown)}")
        wrong = [
            f"{name} expected {list(shape)}, got {_describe(state[name])}"
            for name, shape in self._shapes.items()
            if name in state and _shape(state[name]) != shape
        ]
        if wrong:
            problems.append(f"wrong shape: {_some(wrong)}")
        if problems:
            raise WeightsMismatch(
                f"expected the {len(self._shapes)} weights of the served model,"
                f" got {len(state)}; {'; '.join(problems)}"
            )


def _shape(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return None
    return tuple(value.shape)


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{list(value.shape)}{' without data (meta)' if value.is_meta else ''}"


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:NAMES_SHOWN])
    return shown if len(items) <= NAMES_SHOWN else f"{shown} and {len(items) - NAMES_SHOWN} more"
