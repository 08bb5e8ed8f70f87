"""A small storm; ``python -m benchmarks.storm --backend lmdeploy`` sends as many as wanted."""

from pathlib import Path

from benchmarks.harness.lmdeploy_engine import STORMY
from benchmarks.storm import storm


async def test_random_rollouts_have_exactly_their_rows(tmp_path: Path) -> None:
    seen = await storm(tmp_path, requests=150, seed=1, **STORMY)
    kinds = ("length", "stop", "abort", "closed", "fresh", "resumed", "replayed_alone")
    assert all(seen[kind] for kind in kinds), seen
    assert (seen["left_keys"], seen["left_bytes"]) == (0, 0)
