"""How many rows of a batch route natively although a trainer asked for them, and why."""

from collections import Counter

from serve_app.types import PackedExperts

UNROUTED = "Unrouted"
"""Rows that were put with a repeated expert: no router's choice."""
NOT_VALID = "NotValid"
"""Rows that whoever put them called ``valid=False``."""


def masked_rows(batch: PackedExperts) -> Counter[str]:
    """Count a batch's masked rows by reason; padding and a sequence's last row are none."""
    masked = Counter[str]()
    for missing in batch.missing:
        masked[missing.reason] += missing.count
    masked[UNROUTED] += batch.unrouted
    masked[NOT_VALID] += batch.not_valid
    return +masked
