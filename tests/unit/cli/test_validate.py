"""`r3serve validate`: every kind of mistake that Serve would pass over, and none in what ships."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.cli.serve_config import check_serve_config

GRAPHS = Path(__file__).parents[3] / "graphs"
SHIPPED = sorted(GRAPHS.glob("*.yaml"))


def changed(path: tuple[str | int, ...], value: object, config: str = "rollout.yaml") -> str:
    """A shipped config file with one value changed or added."""
    loaded: Any = yaml.safe_load((GRAPHS / config).read_text())
    at = loaded
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return yaml.safe_dump(loaded)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_ships_is_valid(path: Path) -> None:
    checked = check_serve_config(path.read_text(), models_elsewhere=True)
    assert checked.problems == []
    assert [application.name for application in checked.applications] == ["rollout"]


APP = ("applications", 0)
ENGINE = (*APP, "args", "engine")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("proxy_locatoin",), "EveryNode", "proxy_locatoin: no such key; Serve would ignore it"),
        (("http_options", "prot"), 1, "http_options.prot: no such key"),
        ((*APP, "route_prefixx"), "/", "applications[0].route_prefixx: no such key"),
        ((*APP, "deployments"), [{"name": "x", "replicas": 3}], "deployments[0].replicas: no such"),
        (("http_options", "port"), "x", "http_options.port: Input should be a valid integer"),
        ((*APP, "import_path"), "graphs.nothing:build", "import_path: No module named"),
        ((*APP, "import_path"), "graphs.rollout:biuld", "import_path: module 'graphs.rollout' has"),
        ((*ENGINE, "modle"), "x", "args.engine.modle: Extra inputs are not permitted (got 'x')"),
        ((*ENGINE, "serve", "num_gpu"), 1, "args.engine.serve.num_gpu: Extra inputs are not"),
        ((*ENGINE, "model"), "no/such", "expected a local Hugging Face checkpoint directory"),
    ],
)
def test_what_is_wrong_is_named(path: tuple[str | int, ...], value: object, problem: str) -> None:
    elsewhere = path[-1] != "model"
    checked = check_serve_config(changed(path, value), models_elsewhere=elsewhere)
    assert any(problem in found for found in checked.problems), checked.problems


def test_a_key_that_stands_twice_is_refused() -> None:
    text = (GRAPHS / "rollout.yaml").read_text()
    (problem,) = check_serve_config(text + "proxy_location: Disabled\n").problems
    assert "'proxy_location' stands twice" in problem


@pytest.mark.parametrize("text", ["[1]", "a: [", "applications: 3"])
def test_a_file_of_another_kind_is_refused(text: str) -> None:
    assert check_serve_config(text).problems


def test_the_command_shows_what_will_run_at_its_largest(tmp_path: Path) -> None:
    path = str(GRAPHS / "store.yaml")
    told = CliRunner().invoke(main, ["validate", path])
    assert told.exit_code == 0
    assert [word for word in ("decoder", "1-2", "0.45") if word not in told.stdout] == []


def test_the_command_reads_a_rayservice_and_fails_on_a_wrong_one(tmp_path: Path) -> None:
    for path, code in (((*ENGINE, "model"), 0), ((*ENGINE, "modle"), 1)):
        manifest = {"kind": "RayService", "spec": {"serveConfigV2": changed(path, "/models/x")}}
        file = tmp_path / f"{path[-1]}.yaml"
        file.write_text(yaml.safe_dump_all([{"kind": "Namespace"}, manifest]))
        told = CliRunner().invoke(main, ["validate", str(file), "--models-elsewhere"])
        assert told.exit_code == code, told.output
    assert "modle" in told.stderr


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["validate", str(tmp_path / "none.yaml")])
    assert told.exit_code == 1
    assert "No such file" in told.stderr
