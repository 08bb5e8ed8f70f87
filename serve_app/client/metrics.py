"""What a trainer's process exports of the batches that it assembles itself; see docs/metrics.md."""

import ray
from ray.util.metrics import Counter

from serve_app.observe.masked_rows import masked_rows
from serve_app.types import PackedExperts

MASKED = "r3serve_client_masked_rows_total"
LABELS = ("app", "reason")


class ReaderMetrics:
    """Reports the batches of one client; nothing where there is no Ray."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._masked: Counter | None = None

    def assembled(self, batch: PackedExperts) -> None:
        """Report one batch."""
        masked = masked_rows(batch)
        if not masked or not ray.is_initialized():
            return
        if self._masked is None:
            self._masked = Counter(MASKED, "Masked rows of batches assembled in a trainer.", LABELS)
        for reason, rows in masked.items():
            self._masked.inc(rows, {"app": self._app, "reason": reason})
