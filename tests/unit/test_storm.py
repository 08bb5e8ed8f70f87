"""A small storm; ``python -m benchmarks.storm`` sends 2,000 requests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.storm import storm


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def test_random_rollouts_have_exactly_their_rows(tmp_path: Path) -> None:
    seen = await storm(tmp_path, requests=150, seed=1)
    kinds = ("length", "stop", "abort", "closed", "fresh", "resumed", "replayed_alone")
    assert all(seen[kind] for kind in kinds), seen
    assert (seen["left_keys"], seen["left_bytes"]) == (0, 0)
