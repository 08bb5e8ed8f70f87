"""New weights for LMDeploy's model: checked as a whole, then loaded layer by layer.

Names may be those of the checkpoint or of Transformers' own ``state_dict()``, which holds a
layer's experts in one tensor; LMDeploy knows the former only.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from serve_app.engines.weight_spec import WeightSpec
from serve_app.errors import WeightsMismatch

State = Mapping[str, torch.Tensor]

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class ModelWeights:
    """The names and shapes that a checkpoint's model takes, in both ways of naming them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = _files(path)
        self._model = _meta_model(path)
        self._spec = None if self._model is None else WeightSpec(self._model)

    def checked(self, state: State) -> dict[str, torch.Tensor]:
        """Return ``state``, taken once; raise `WeightsMismatch` unless all of it fits."""
        taken = dict(state)
        if self._spec is None or taken.keys() == self._files.keys():
            self._check_names(taken)
        else:
            self._spec.check_state(taken)
        return taken

    def buckets(self, state: State) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield checked weights in the checkpoint's names, those of one layer together."""
        model = None if state.keys() == self._files.keys() else self._model

        def layer(name: str) -> int:
            found = _LAYER.search(name)
            return int(found[1]) if found else -1

        for _, names in itertools.groupby(sorted(state, key=layer), layer):
            bucket = {name: state[name] for name in names}
            if model is not None:
                bucket = revert_weight_conversion(model, bucket)
            yield list(bucket.items())

    def stored(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield the checkpoint's own weights, a file at a time."""
        for file in sorted(set(self._files.values())):
            with safe_open(self._path / file, "pt") as tensors:
                yield [(name, tensors.get_tensor(name)) for name in tensors.keys()]  # noqa: SIM118

    def _check_names(self, state: State) -> None:
        missing, unknown = self._files.keys() - state.keys(), state.keys() - self._files.keys()
        if missing or unknown:
            raise WeightsMismatch(
                f"expected the {len(self._files)} weights of the checkpoint, got {len(state)};"
                f" missing: {sorted(missing)[:5]}, unknown: {sorted(unknown)[:5]}"
            )
        for file in sorted(set(self._files.values())):
            with safe_open(self._path / file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    expected = tensors.get_slice(name).get_shape()
                    if list(state[name].shape) != expected:
                        raise WeightsMismatch(
                            f"{name} expected {expected}, got {list(state[name].shape)}"
                        )


def _files(path: Path) -> dict[str, str]:
    """Return which file has each weight."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return found
    name = "model.safetensors"
    if not (path / name).is_file():
        raise ValueError(f"expected a checkpoint in safetensors files, {path} has none")
    with safe_open(path / name, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), name)


def _meta_model(path: Path) -> PreTrainedModel | None:
    """Build the model without its weights; None where Transformers does not know it."""
    config = json.loads((path / "config.json").read_text())
    family: Any = getattr(transformers, (config.get("architectures") or ["?"])[0], None)
    if family is None:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = family(AutoConfig.from_pretrained(path, local_files_only=True))
    return model
