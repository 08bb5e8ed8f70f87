"""The Grafana dashboard: which metrics its queries name."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.overlay import ROOT

DASHBOARD = ROOT / "k8s" / "grafana-dashboard.json"
_OURS = "ray_r3serve_"


def queries() -> list[str]:
    """Return every query of the dashboard."""
    return sorted(set(_expressions(json.loads(DASHBOARD.read_text()))))


def _expressions(at: Any) -> Iterator[str]:
    if isinstance(at, list):
        for item in at:
            yield from _expressions(item)
    elif isinstance(at, dict):
        for key, value in at.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)


def dashboard_names(of_ray: bool) -> set[str]:
    """Return the metrics that queries name: Ray's and Serve's own, or ours, as Ray exports them."""
    found = set()
    for query in queries():
        bare = re.sub(r"\{[^}]*\}", "", query)
        found |= set(re.findall(r"\bray_[a-z0-9_]+", bare))
    named = {re.sub("_(bucket|count|sum)$", "", name) for name in found}
    return {name for name in named if name.startswith(_OURS) != of_ray}
