"""New weights for a served model, and where they are while it sleeps."""

from collections.abc import Mapping

import torch
from torch import nn


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy checked weights in place, cast to the model's own dtypes."""
    with torch.no_grad():
        model.load_state_dict(state, strict=False)


class ParkedWeights:
    """A model's weights while it sleeps: the model itself holds none."""

    def __init__(self, model: nn.Module, *, keep: bool) -> None:
        self.kept = True
        # Tied weights are one parameter, and come once.
        self._homes = [(weight, weight.device, weight.data.cpu()) for weight in model.parameters()]
        for weight, _, _ in self._homes:
            weight.data = weight.data.new_empty(0)
        if not keep:
            self.drop()

    def drop(self) -> None:
        """Forget the values; shapes and dtypes stay."""
        self.kept = False
        self._homes = [(weight, device, data.to("meta")) for weight, device, data in self._homes]

    def restore(self) -> None:
        """Give the model its weights back, or room for new ones where they were dropped."""
        for weight, device, data in self._homes:
            here = data.to(device) if self.kept else torch.empty_like(data, device=device)
            weight.data = here
