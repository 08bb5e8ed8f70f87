"""What deployments export: metrics by declared name.

Names are declared as data, so that docs/metrics.md and the dashboard can be held against them.
Serve adds deployment, replica and application to the metrics of its replicas; Ray exports every
name with the prefix ``ray_``.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.serve import metrics

_ANSWERED_S = 0.01
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric: its kind, what it says, and the labels it has of its own."""

    kind: Literal["counter", "gauge", "seconds"]
    says: str
    labels: tuple[str, ...] = ()


Declared = Mapping[str, Instrument]


def after_answering(report: Callable[[], None]) -> None:
    """Report a little later on the running loop, in this call's context: its caller waits."""
    asyncio.get_running_loop().call_later(_ANSWERED_S, report)


class Instruments:
    """The metrics that one process exports."""

    def __init__(self, declared: Declared) -> None:
        self._made = {name: _make(name, instrument) for name, instrument in declared.items()}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        metric = self._made[name]
        assert isinstance(metric, metrics.Counter)
        if amount > 0:
            metric.inc(amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        metric = self._made[name]
        assert isinstance(metric, metrics.Gauge)
        metric.set(value, labels)

    def took(self, name: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram."""
        metric = self._made[name]
        assert isinstance(metric, metrics.Histogram)
        metric.observe(seconds, labels)


def _make(name: str, instrument: Instrument) -> metrics.Counter | metrics.Gauge | metrics.Histogram:
    labels: Any = instrument.labels  # Serve's annotation allows for exactly one
    if instrument.kind == "counter":
        return metrics.Counter(name, instrument.says, labels)
    if instrument.kind == "gauge":
        return metrics.Gauge(name, instrument.says, labels)
    return metrics.Histogram(name, instrument.says, list(SECONDS), labels)
