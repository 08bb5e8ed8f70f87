"""A small storm; ``python -m benchmarks.storm`` sends 2,000 requests."""

from pathlib import Path

import pytest

from benchmarks.storm import storm

pytestmark = pytest.mark.usefixtures("one_thread")


async def test_random_rollouts_have_exactly_their_rows(tmp_path: Path) -> None:
    seen = await storm(tmp_path, requests=150, seed=1)
    kinds = ("length", "stop", "abort", "closed", "fresh", "resumed", "replayed_alone")
    assert all(seen[kind] for kind in kinds), seen
    assert (seen["left_keys"], seen["left_bytes"]) == (0, 0)
