"""Groups of GPUs on a real cluster: where Serve puts one, and what is said where none can be."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.exceptions import RayServeException
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.client.served import ENGINE
from serve_app.deployments.gpus import check_gpus, live_nodes
from tests.group_args import group_engine

APP = "grouped"
GRAPHS = Path(__file__).parents[3] / "graphs"


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_gpus_is_told_so(tiny_checkpoint: Path) -> None:
    said = "asks for 1 GPU a replica and this cluster has 0: start Ray on a machine with GPUs"
    with pytest.raises(RayServeException, match=said):
        check_gpus(group_engine(tiny_checkpoint, {}, num_gpus=1))
    with pytest.raises(RayServeException, match="asks for 2 GPU a replica and this cluster has 0"):
        check_gpus(group_engine(tiny_checkpoint, {"tp": 2}))
    check_gpus(group_engine(tiny_checkpoint, {}))


@pytest.fixture(scope="module")
def gpu_nodes(cluster: Cluster) -> Iterator[list[str]]:
    """Two nodes that say they have GPUs: four and two of them. Returns their names."""
    added = [
        cluster.add_node(num_cpus=gpus + 1, num_gpus=gpus, object_store_memory=80 << 20)
        for gpus in (4, 2)
    ]
    cluster.wait_for_nodes()
    yield [node.node_id for node in added]
    for node in added:
        cluster.remove_node(node)


class WhereItIs:
    """Stands for an engine: says where the bundles of its replica are."""

    def __call__(self) -> dict[str, Any]:
        group = ray.util.get_current_placement_group()
        table: dict[str, Any] = ray.util.placement_group_table(group)
        return table | {"driver": ray.get_runtime_context().get_node_id()}


def test_a_group_lies_where_its_sizes_say(gpu_nodes: list[str], tiny_checkpoint: Path) -> None:
    args = group_engine(tiny_checkpoint, {"dp": 4, "ep": 4})
    check_gpus(args)
    deployed = serve.deployment(name=ENGINE, **args.deployment())(WhereItIs)
    handle = serve.run(deployed.bind(), name=APP, route_prefix=None)
    found = handle.remote().result(timeout_s=30)
    assert found["strategy"] == "STRICT_PACK"
    assert set(found["bundles_to_node_id"].values()) == {gpu_nodes[0]} == {found["driver"]}
    assert found["bundles"] == {0: {"CPU": 1}, **{n: {"GPU": 1, "CPU": 1} for n in range(1, 5)}}
    said = CliRunner().invoke(main, ["doctor", "--address", "auto"], env={"COLUMNS": "250"}).stdout
    assert f"CREATED: 4 GPU and 5 CPU on {gpu_nodes[0][:10]}" in said
    assert "HEALTHY, replicas: 1 RUNNING" in said
    serve.delete(APP)


def test_what_finds_no_node_is_refused_and_what_spans_nodes_is_not(
    gpu_nodes: list[str], tiny_checkpoint: Path
) -> None:
    said = "asks for 6 GPU a replica and this cluster has 6: expected 6 GPU and 7 CPU on one node"
    with pytest.raises(RayServeException, match=said) as refused:
        check_gpus(group_engine(tiny_checkpoint, {"tp": 6}))
    assert "placement_group_strategy PACK" in str(refused.value)
    check_gpus(group_engine(tiny_checkpoint, {"tp": 6}, placement_group_strategy="PACK"))
    with pytest.raises(RayServeException, match="8 GPU and 9 CPU over the nodes"):
        check_gpus(group_engine(tiny_checkpoint, {"tp": 8}, placement_group_strategy="PACK"))


def test_what_lacks_is_logged_alone_where_nodes_come_by_themselves(
    cluster: Cluster,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """KubeRay deploys the application as soon as the head is up: its GPU pods may still start."""
    large = group_engine(tiny_checkpoint, {"dp": 8, "ep": 8})
    with pytest.raises(RayServeException):
        check_gpus(large)
    monkeypatch.setenv("RAY_NODE_TYPE_NAME", "cpu")  # as KubeRay tells every pod its group
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    check_gpus(large)
    assert "asks for 8 GPU a replica" in caplog.text
    cluster.remove_node(node)


@pytest.mark.parametrize(
    ("ranks", "code", "said"),
    [
        (4, 1, "room for 1 ("),
        (8, 1, "no room for one"),
    ],
)
def test_doctor_says_for_how_many_groups_there_is_room(
    ranks: int, code: int, said: str, gpu_nodes: list[str], tmp_path: Path
) -> None:
    config = yaml.safe_load((GRAPHS / "lmdeploy_ep.yaml").read_text())
    args = config["applications"][0]["args"]["engine"]
    args["engine_kwargs"] |= {"dp": ranks, "ep": ranks}
    args["serve"]["min_replicas"] = 2
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    words = ["doctor", "--address", "auto", "--config", str(file)]
    told = CliRunner().invoke(main, words, env={"COLUMNS": "250"})
    assert told.exit_code == code, told.output
    assert said in told.stdout
    assert len([node for node in live_nodes() if node.resources.get("GPU")]) == 2
