"""Which nodes have room for a replica, and what is said where none has."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.deployments.gpus import unplaceable
from serve_app.deployments.nodes import Node, amounts, lacking, replicas_on
from serve_app.serve_options import ServeOptions
from tests.group_args import group_engine

FOUR = ({"CPU": 1.0}, *4 * ({"GPU": 1.0, "CPU": 1.0},))


def group(bundles: Any = FOUR, strategy: Any = None) -> ServeOptions:
    return ServeOptions(
        num_cpus=1, placement_group_bundles=bundles, placement_group_strategy=strategy
    )


def nodes(*sizes: tuple[float, float]) -> list[Node]:
    """Nodes a, b, c … of so many GPUs and CPUs; Ray names what there is none of not at all."""
    kinds = [{"GPU": gpus, "CPU": cpus, "memory": 1e9} for gpus, cpus in sizes]
    named = zip("abcdefgh", kinds, strict=False)
    return [Node(name, {kind: n for kind, n in has.items() if n}) for name, has in named]


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([(4, 5)], [["a"]]),
        ([(4, 4.5)], []),  # a CPU for the driver is missing
        ([(0, 64), (3, 64), (8, 64)], [["c"], ["c"]]),
        ([(4, 8), (4, 8), (4, 4)], [["a"], ["b"]]),
        ([(2, 8), (2, 8)], []),
        ([], []),
    ],
)
def test_strict_pack_wants_all_of_a_group_on_one_node(
    sizes: list[tuple[float, float]], found: list[list[str]]
) -> None:
    assert replicas_on(group(), nodes(*sizes), most=8) == found
    assert bool(lacking(group(), nodes(*sizes))) == (not found)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([(2, 8), (2, 8)], [["a", "b"]]),
        ([(0, 1), (2, 2), (2, 2)], [["a", "b", "c"]]),  # the driver where no GPU is
        ([(2, 2), (2, 2)], []),  # nothing left for the driver
        ([(8, 1), (0, 64)], []),  # GPUs without CPUs beside them
        ([(6, 12), (6, 12)], [["a"], ["a", "b"], ["b"]]),
    ],
)
def test_pack_wants_the_sum_and_a_place_for_each_gpu(
    sizes: list[tuple[float, float]], found: list[list[str]]
) -> None:
    told = replicas_on(group(strategy="PACK"), nodes(*sizes), most=8)
    assert len(told) == len(found)
    if len(found) == 1:
        assert told == found


def test_a_single_engine_is_placed_by_its_own_resources() -> None:
    alone = ServeOptions(num_cpus=0.5, num_gpus=0.5)
    assert replicas_on(alone, nodes((1, 0.9)), most=8) == [["a"]]
    assert len(replicas_on(alone, nodes((1, 8)), most=8)) == 2
    assert lacking(alone, nodes((0, 8))) == (
        "expected 0.5 GPU and 0.5 CPU on one node, the largest has 0 GPU and 8 CPU"
    )


def test_resources_of_any_kind_count() -> None:
    bundles = ({"CPU": 1.0}, {"GPU": 1.0, "accelerator_type:H200": 0.001})
    assert lacking(group(bundles), nodes((1, 1))) == (
        "expected 1 GPU, 1 CPU and 0.001 accelerator_type:H200 on one node,"
        " the largest has 1 GPU, 1 CPU and 0 accelerator_type:H200"
    )
    assert amounts({}) == "nothing"


@pytest.mark.parametrize(
    ("sizes", "there", "said"),
    [
        (
            {"tp": 4},
            [(2, 8), (1, 32)],
            "engine.serve asks for 4 GPU a replica and this cluster has 3: expected 4 GPU and 5 CPU"
            " on one node, the largest has 2 GPU and 8 CPU (tp 4)."
            " Choose smaller sizes, or larger nodes",
        ),
        (
            {"tp": 4},
            [(2, 8), (2, 8)],
            "engine.serve asks for 4 GPU a replica and this cluster has 4: expected 4 GPU and 5 CPU"
            " on one node, the largest has 2 GPU and 8 CPU (tp 4). Choose smaller"
            " sizes, larger nodes, or engine.serve.placement_group_strategy PACK, which lets a"
            " group span nodes",
        ),
        (
            {"dp": 16, "ep": 16},
            [(8, 6), (8, 64)],
            "engine.serve asks for 16 GPU a replica and this cluster has 16: expected 16 GPU and"
            " 17 CPU over the nodes, 1 GPU and 1 CPU of it together for each GPU; they have 16 GPU"
            " and 70 CPU, with room for 14 such (dp 16, ep 16). Choose smaller sizes, or more"
            " nodes",
        ),
    ],
)
def test_what_a_cluster_lacks_for_a_group_is_said_with_what_to_do(
    sizes: dict[str, int], there: list[tuple[float, float]], said: str, tiny_checkpoint: Path
) -> None:
    args = group_engine(tiny_checkpoint, sizes)
    assert unplaceable(args, nodes(*there)) == said
    assert unplaceable(args, nodes(*there, (16, 32))) == ""


def test_a_cluster_without_gpus_is_told_so_first(tiny_checkpoint: Path) -> None:
    said = unplaceable(group_engine(tiny_checkpoint, {}, num_gpus=1), nodes((0, 8)))
    assert said.startswith(
        "engine.serve asks for 1 GPU a replica and this cluster has 0: start Ray"
    )
    few = unplaceable(group_engine(tiny_checkpoint, {}, num_gpus=1), nodes((1, 0.5)))
    assert "expected 1 GPU and 1 CPU on one node, the largest has 1 GPU and 0.5 CPU" in few
