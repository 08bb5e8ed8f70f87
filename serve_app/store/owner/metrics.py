"""A shard's metrics, as Ray exports them to Prometheus; reported once a sweep."""

from dataclasses import asdict

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.types import ShardStats

_TAGS = ("app", "shard")
_LATENCIES_S = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]

GAUGES = {
    "live_keys": "Keys that read now.",
    "live_bytes": "Bytes held for live keys.",
    "byte_budget": "Bytes that may be held.",
    "waiting_puts": "Puts that wait for room.",
    "oldest_s": "Age of the oldest record held, in seconds.",
}
COUNTERS = {
    "puts": "Records stored.",
    "gets": "Keys read.",
    "released": "Keys released.",
    "expired": "Keys whose lease ended.",
    "full": "Puts refused because the budget stayed exhausted.",
    "lost": "Reads of keys that an earlier process of the shard held.",
    "unrouted_rows": "Rows put with a repeated expert in a layer: nobody routed them.",
    "shared_rows": "Rows that children did not store because an ancestor had them.",
}
LATENCY = "r3serve_store_call_seconds"


def metric_name(field: str) -> str:
    """Return the exported name of a field of `ShardStats`."""
    return f"r3serve_store_{field}" + ("_total" if field in COUNTERS else "")


class ShardMetrics:
    """Exports one shard's `ShardStats` and the time its calls take."""

    def __init__(self, app: str, shard: str) -> None:
        tags = {"app": app, "shard": shard}
        self._gauges = {
            field: Gauge(metric_name(field), text, _TAGS) for field, text in GAUGES.items()
        }
        self._counters = {
            field: Counter(metric_name(field), text, _TAGS) for field, text in COUNTERS.items()
        }
        self._latency = Histogram(
            LATENCY,
            "Time in a shard call, waiting for room included.",
            _LATENCIES_S,
            ("call", *_TAGS),
        )
        for metric in (*self._gauges.values(), *self._counters.values(), self._latency):
            metric.set_default_tags(tags)
        self._seen = dict.fromkeys(COUNTERS, 0)
        self._took: list[tuple[str, float]] = []

    def report(self, stats: ShardStats) -> None:
        """Export what is held, and what happened since the last report."""
        now = asdict(stats)
        for field, gauge in self._gauges.items():
            gauge.set(now[field])
        for field, counter in self._counters.items():
            if now[field] > self._seen[field]:
                counter.inc(now[field] - self._seen[field])
                self._seen[field] = now[field]
        took, self._took = self._took, []
        for call, seconds in took:
            self._latency.observe(seconds, {"call": call})

    def took(self, call: str, seconds: float) -> None:
        """Note how long one batched call took: its caller waits, so it is exported later."""
        self._took.append((call, seconds))
