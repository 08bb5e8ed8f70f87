"""`r3serve store snapshot`, `restore` and `plot` on a running store; doctor on its cluster."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import ray
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.client.served import ServedGraph
from serve_app.errors import EngineUnavailable
from serve_app.types import ShardStats
from tests.store_contract import LARGE, SMALL, MakeStore, read, record


def run(*words: str) -> str:
    told = CliRunner().invoke(main, list(words), env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    return told.stdout


def test_a_store_is_saved_and_comes_back_under_its_old_keys(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(app="saved")
    keys = [store.put(record(shape, seed=3), tag="a") for shape in (SMALL, LARGE)]
    store.put(record(SMALL), tag="b")
    path = str(tmp_path / "a")
    assert "saved 2 records" in run("store", "snapshot", "saved", path, "--tag", "a")
    assert "removed" in run("store", "destroy", "saved")
    store = make_store(app="saved")
    assert "restored 2 records" in run("store", "restore", "saved", path)
    for shape, key in zip((SMALL, LARGE), keys, strict=True):
        np.testing.assert_array_equal(read(store, key)[0].ids, record(shape, seed=3).ids)
    again = CliRunner().invoke(main, ["store", "snapshot", "saved", path])
    assert again.exit_code == 1
    assert "never overwrites" in again.stderr.replace("\n", " ")


def test_a_running_store_is_drawn(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(app="drawn")
    for seed in range(3):
        store.put(record(LARGE, seed=seed))
    assert f"{3 * LARGE[0]:,} tokens" in run("plot", "drawn", "--out", str(tmp_path))
    assert (tmp_path / "expert-load.png").stat().st_size > 10_000


def test_doctor_looks_at_the_cluster_too(make_store: MakeStore) -> None:
    told = run("doctor", "--address", "auto")
    assert told.count("half of it for records") == 3


@pytest.mark.parametrize("columns", [80, 200])
def test_status_cuts_no_name_short_whatever_the_terminals_width(
    make_store: MakeStore, columns: int
) -> None:
    store = make_store(app="shown")
    store.put(record(LARGE))
    told = CliRunner().invoke(main, ["store", "status", "shown"], env={"COLUMNS": str(columns)})
    assert told.exit_code == 0, told.output
    assert all(len(line) <= columns for line in told.stdout.splitlines())
    said = told.stdout.replace("\n", " ")
    for field in dataclasses.fields(ShardStats):
        assert field.name in said
    assert f"{record(LARGE).meta.nbytes:,}" in said
    assert ("live_keys ┃ live_bytes" in said) == (columns == 200)  # one table, or one a shard


def test_what_is_asked_of_which_cluster_is_said(make_store: MakeStore) -> None:
    cluster = f"the Ray cluster at {ray.get_runtime_context().gcs_address}"
    make_store(app="named")
    assert cluster in run("store", "status", "named").replace("\n", " ")
    assert cluster in run("store", "destroy", "named").replace("\n", " ")
    for command in ("status", "destroy"):
        told = CliRunner().invoke(main, ["store", command, "nobody"], env={"COLUMNS": "200"})
        assert told.exit_code == 1
        assert f"named 'nobody' runs in {cluster}" in told.stderr.replace("\n", " ")
    with pytest.raises(EngineUnavailable, match="is being served in the Ray cluster at"):
        ServedGraph("nobody", None, 5).engine  # noqa: B018
