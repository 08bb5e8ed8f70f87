"""The recipes of docs/trainers.md, each run as it is, on the store in this process."""

from pathlib import Path
from types import ModuleType

import pytest

from examples.recipes import fsdp, megatron, slime, xtuner
from examples.recipes.samples import put_samples
from serve_app.client import RoutedExpertsClient
from serve_app.client.served import Handles


@pytest.fixture
def client() -> RoutedExpertsClient:
    return RoutedExpertsClient("recipes", handles=Handles(None, None, "recipes"))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (xtuner, "5 samples, 256 rows for 2 ranks, 7 keys released"),
        (megatron, "8 ranks, 992 bytes at most of 7168 to each, 6 keys released"),
        (slime, "4 ranks of 64 rows, 6 keys released"),
    ],
)
def test_a_recipe_agrees_with_its_framework(
    recipe: ModuleType, says: str, client: RoutedExpertsClient
) -> None:
    assert recipe.run(client) == says
    assert client.stats().live_keys == 0


def test_a_sharded_model_replays_in_both_passes(
    client: RoutedExpertsClient, tmp_path: Path
) -> None:
    samples = put_samples(client, fsdp.MODEL, fsdp.LENGTHS, "step-1")
    rank = fsdp.Rank(fsdp.checkpoint(tmp_path), 0, 1, fsdp.free_port())
    try:
        assert rank.train(client, samples) == 1.0
    finally:
        rank.close()
    assert client.release(tag="step-1") == 6
