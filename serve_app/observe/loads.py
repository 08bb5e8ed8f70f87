"""Which experts were chosen how often: loads by layer and weight version, and how they drift."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far apart two versions' loads are: ``distance`` ``[layers]``, each in [0, 1]."""

    before: int
    after: int
    distance: Shares


class ExpertLoads:
    """Counts choices ``[layers, experts]`` a weight version, over records of one model.

    Rows that must route natively are left out, and so are dense layers.
    """

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.num_experts = 0
        self.tokens: dict[int, int] = {}
        self._counts: dict[int, Counts] = {}

    @property
    def versions(self) -> list[int]:
        """The weight versions seen, in order."""
        return sorted(self._counts)

    def add(self, record: Record) -> None:
        """Count a record; raise `RecordError` if it is of another model, or of none."""
        model = (record.moe_layers, record.num_experts)
        if not self._counts:
            self.layers, self.num_experts = model
        if model != (self.layers, self.num_experts):
            raise RecordError(
                f"expected routes of {len(self.layers)} MoE layers and {self.num_experts} experts,"
                f" got {len(model[0])} and {model[1]}: one model at a time"
            )
        ids: npt.NDArray[Any] = record.ids[record.valid][:, list(self.layers)]
        shape = len(self.layers), self.num_experts
        counts = self._counts.setdefault(record.weight_version, np.zeros(shape, np.int64))
        for column, row in enumerate(counts):
            row += np.bincount(ids[:, column].reshape(-1), minlength=self.num_experts)
        tokens = self.tokens.get(record.weight_version, 0)
        self.tokens[record.weight_version] = tokens + len(ids)

    def relative(self, versions: Sequence[int] | None = None) -> Shares:
        """Return ``[layers, experts]``: 1 where an expert got its even share of the choices."""
        chosen = self.versions if versions is None else versions
        total = np.sum([self._counts[version] for version in chosen], axis=0)
        return np.asarray(_shares(total) * self.num_experts)

    def imbalance(self) -> Shares:
        """Return ``[layers]``: the busiest expert's load over the mean."""
        return np.asarray(self.relative().max(axis=1))

    def drift(self) -> list[Drift]:
        """Compare each version with the one before, by total variation: the share of choices
        that would have to move to other experts.
        """
        found = []
        for before, after in zip(self.versions, self.versions[1:], strict=False):
            shares = _shares(self._counts[before]), _shares(self._counts[after])
            found.append(Drift(before, after, np.abs(shares[0] - shares[1]).sum(axis=1) / 2))
        return found


def _shares(counts: Counts) -> Shares:
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
