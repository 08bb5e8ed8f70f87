"""What `r3serve validate` and `r3serve doctor` say of engine groups."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.cli.groups import group_text, placed_groups, room_for, serving
from serve_app.client.served import ENGINE
from serve_app.deployments.nodes import Node
from tests.group_args import group_engine

GRAPHS = Path(__file__).parents[3] / "graphs"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("lmdeploy_tp.yaml", "1-2 replicas of 4 GPUs each (tp 4), on one node"),
        ("lmdeploy_ep.yaml", "1-2 replicas of 8 GPUs each (dp 8, ep 8), on one node"),
        ("lmdeploy.yaml", None),
    ],
)
def test_validate_says_what_a_replica_is(config: str, says: str | None) -> None:
    words = ["validate", str(GRAPHS / config), "--models-elsewhere"]
    told = CliRunner().invoke(main, words, env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    if says is None:
        assert "count such groups" not in told.stdout
    else:
        assert f"engine: {says}; min_replicas and max_replicas count such groups" in told.stdout


def test_validate_counts_the_gpus_of_groups_and_refuses_sizes_that_do_not_fit(
    tmp_path: Path,
) -> None:
    config = yaml.safe_load((GRAPHS / "lmdeploy_ep.yaml").read_text())
    file = tmp_path / "serve.yaml"
    for ranks, code in ((8, 0), (3, 1)):
        config["applications"][0]["args"]["engine"]["engine_kwargs"]["dp"] = ranks
        file.write_text(yaml.safe_dump(config))
        words = ["validate", str(file), "--models-elsewhere"]
        told = CliRunner().invoke(main, words, env={"COLUMNS": "200"})
        assert told.exit_code == code, told.output
        if code:
            assert "got dp 3, ep 8" in told.stderr.replace("\n", " ")
        else:
            assert "│ at its largest │          │ 20.55 │ 16" in told.stdout


def test_fixed_and_large_groups_in_words(tiny_checkpoint: Path) -> None:
    assert group_text(group_engine(tiny_checkpoint, {"tp": 2})) == (
        "1 replica of 2 GPUs each (tp 2), on one node"
    )
    assert group_text(group_engine(tiny_checkpoint, {"dp": 16, "ep": 16})).endswith(
        "(dp 16, ep 16), on as few nodes as it takes"
    )


FOUR, EIGHT = {"tp": 4}, {"dp": 8, "ep": 8}


@pytest.mark.parametrize(
    ("sizes", "there", "free", "grows", "verdict", "found"),
    [
        (FOUR, (8, 8), (8, 4), False, "ok", "room for 2 (2 on a), now free for 2"),
        (FOUR, (4, 4), (3, 4), False, "ok", "room for 2 (a, b), now free for 1"),
        (EIGHT, (8, 0), (8, 0), False, "warning", "room for 1 (a), now free for 1"),
        (EIGHT, (16, 0), (16, 0), False, "ok", "room for 2 (2 on a), now free for 2"),
        (FOUR, (2, 2), (2, 2), False, "wrong", "no room for one"),
        (FOUR, (2, 2), (2, 2), True, "warning", "no room for one"),
    ],
)
def test_doctor_judges_a_clusters_room_for_groups(
    sizes: dict[str, int],
    there: tuple[int, int],
    free: tuple[int, int],
    grows: bool,
    verdict: str,
    found: str,
    tiny_checkpoint: Path,
) -> None:
    args = group_engine(tiny_checkpoint, sizes, min_replicas=1, max_replicas=2)
    all_of, left = (
        [Node(name, {"GPU": n, "CPU": 64}) for name, n in zip("ab", many, strict=True)]
        for many in (there, free)
    )
    finding = room_for("rollout", args, all_of, left, grows)
    assert (finding.what, finding.verdict) == ("engine of rollout", verdict)
    assert found in finding.found
    if verdict == "wrong":
        assert "expected 4 GPU and 5 CPU on one node" in finding.advice
    assert bool(finding.advice) == (verdict != "ok")


def test_fewer_than_the_least_is_wrong(tiny_checkpoint: Path) -> None:
    args = group_engine(tiny_checkpoint, {"tp": 4}, min_replicas=2, max_replicas=2)
    nodes = [Node("a", {"GPU": 4, "CPU": 64})]
    finding = room_for("rollout", args, nodes, nodes, False)
    assert finding.verdict == "wrong"
    assert finding.advice == "more nodes, or less than min_replicas 2"


def test_doctor_says_where_groups_are_and_what_others_wait_for() -> None:
    bundles = {0: {"CPU": 1.0}, 1: {"GPU": 1.0, "CPU": 1.0}, 2: {"GPU": 1.0, "CPU": 1.0}}

    def group(name: str, state: str, *on: str) -> dict[str, Any]:
        placed = dict(zip(bundles, [*on, "", "", ""], strict=False))
        return {
            "name": name,
            "state": state,
            "bundles": bundles,
            "bundles_to_node_id": placed,
            "strategy": "STRICT_PACK",
        }

    table = {
        "1": group("SERVE_REPLICA::rollout#InferenceEngine#x1", "CREATED", *3 * ("abcdef",)),
        "2": group("SERVE_REPLICA::rollout#InferenceEngine#x2", "PENDING"),
        "3": group("SERVE_REPLICA::rollout#InferenceEngine#x3", "REMOVED"),
        "4": group("somebody else's", "CREATED", "abcdef"),
    }
    here, waits = placed_groups(table, [Node("abcdef", {"GPU": 2, "CPU": 2})])
    assert (here.verdict, here.found) == ("ok", "CREATED: 2 GPU and 3 CPU on abcdef")
    assert (waits.what, waits.verdict) == ("replica rollout#InferenceEngine#x2", "warning")
    assert waits.advice == "expected 2 GPU and 3 CPU on one node, the largest has 2 GPU and 2 CPU"
    _, waits = placed_groups(table, [Node("abcdef", {"GPU": 2, "CPU": 4})])
    assert "not free" in waits.advice


def test_doctor_says_how_served_engines_are() -> None:
    def application(**engine: Any) -> Any:
        return SimpleNamespace(deployments={ENGINE: SimpleNamespace(**engine)})

    well = application(status="HEALTHY", replica_states={"RUNNING": 2}, message="")
    ill = application(status="UPDATING", replica_states={"STARTING": 1}, message="waits for 4 GPU")
    store = SimpleNamespace(deployments={})
    one, two = serving({"a": well, "b": ill, "c": store})
    assert (one.verdict, one.found) == ("ok", "HEALTHY, replicas: 2 RUNNING")
    assert (two.verdict, two.advice) == ("warning", "waits for 4 GPU")


def test_room_is_asked_of_a_cluster() -> None:
    told = CliRunner().invoke(main, ["doctor", "--config", str(GRAPHS / "lmdeploy_tp.yaml")])
    assert told.exit_code == 1
    assert "--address" in told.stderr
