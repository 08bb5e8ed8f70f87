"""Our arithmetic of a group's GPUs beside LMDeploy's own, over all sizes that come up."""

from itertools import product
from typing import Any

import pytest
from lmdeploy.pytorch.config import DistConfig

from serve_app.group_shape import GroupShape, group_shape

SIZES = (1, 2, 4, 8)
OPTIONAL = (None, *SIZES)


def ours(sizes: dict[str, Any]) -> GroupShape | None:
    try:
        return group_shape(sizes)
    except ValueError:
        return None


def theirs(sizes: dict[str, Any]) -> tuple[int, int] | None:
    """Return the GPUs of all ranks, and those that attention of one rank is on."""
    own = {name.removesuffix("_size"): value for name, value in sizes.items()}
    try:
        dist = DistConfig(**own)
    except AssertionError:
        return None
    return dist.world_size, dist.attn_tp


@pytest.mark.parametrize("dp", SIZES)
def test_every_combination_of_sizes_makes_the_same_group_as_lmdeploy(dp: int) -> None:
    taken = 0
    for tp, ep, attention, mlp, moe in product(SIZES, SIZES, OPTIONAL, OPTIONAL, OPTIONAL):
        sizes = {
            "tp": tp,
            "dp": dp,
            "ep": ep,
            "attn_tp_size": attention,
            "mlp_tp_size": mlp,
            "moe_tp_size": moe,
        }
        shape, lmdeploy = ours(sizes), theirs(sizes)
        if lmdeploy is None or lmdeploy[1] * dp != lmdeploy[0]:
            assert shape is None, (sizes, shape, lmdeploy)
        else:
            assert shape is not None, (sizes, lmdeploy)
            assert (shape.gpus, shape.workers, shape.ranks) == (*lmdeploy, dp), (sizes, shape)
            taken += 1
    assert taken > 50
