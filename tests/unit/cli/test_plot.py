"""Expert loads and their drift, and the pictures that `r3serve plot` draws of a snapshot."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.errors import RecordError
from serve_app.observe.loads import ExpertLoads
from serve_app.records import Record, make_record
from serve_app.store.snapshot import Entry, SnapshotWriter
from tests.distinct_ids import distinct_ids

EXPERTS = 8


def of_version(
    version: int, shift: int = 0, rows: int = 50, invalid: tuple[int, ...] = ()
) -> Record:
    """Three layers, the middle one dense; experts 0 to 3 by turns, moved on by ``shift``."""
    turns = np.arange(rows)[:, None, None] * 2 + np.arange(2)
    ids = np.broadcast_to((turns % 4 + shift) % EXPERTS, (rows, 3, 2))
    valid = np.ones(rows, np.bool_)
    valid[list(invalid)] = False
    return make_record(
        ids, num_experts=EXPERTS, moe_layers=(0, 2), weight_version=version, valid=valid
    )


def test_an_even_load_is_one_and_dense_layers_are_left_out() -> None:
    loads = ExpertLoads()
    loads.add(of_version(0))
    assert loads.layers == (0, 2)
    np.testing.assert_array_equal(loads.relative(), [[2, 2, 2, 2, 0, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(loads.imbalance(), [2, 2])


def test_drift_is_the_share_of_choices_that_moved() -> None:
    loads = ExpertLoads()
    for version, shift in ((0, 0), (3, 1), (4, 1), (9, 5)):
        loads.add(of_version(version, shift))
    steps = [(step.before, step.after, step.distance.tolist()) for step in loads.drift()]
    assert steps == [(0, 3, [0.25, 0.25]), (3, 4, [0, 0]), (4, 9, [1, 1])]


def test_rows_that_route_natively_do_not_count() -> None:
    loads = ExpertLoads()
    loads.add(of_version(0, rows=4, invalid=(0, 2)))
    assert loads.tokens == {0: 2}


def test_records_of_two_models_are_not_mixed() -> None:
    loads = ExpertLoads()
    loads.add(of_version(0))
    with pytest.raises(RecordError, match="2 MoE layers and 8 experts, got 4 and 16"):
        loads.add(make_record(distinct_ids((3, 4, 2), 16), num_experts=16))


def snapshot(path: Path, versions: list[int]) -> Path:
    writer = SnapshotWriter(path, "rollout", b"secret")
    for version in versions:
        record = of_version(version, shift=version)
        writer.write([Entry(f"key-{version}", None, None, 60, True, record.meta)], [record])
    writer.commit()
    return path


def is_picture(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_plot_draws_a_snapshot(tmp_path: Path) -> None:
    saved = snapshot(tmp_path / "saved", [1, 2, 3])
    told = CliRunner().invoke(main, ["plot", str(saved), "--out", str(tmp_path / "docs")])
    assert told.exit_code == 0, told.output
    assert is_picture(tmp_path / "docs" / "expert-load.png")
    assert is_picture(tmp_path / "docs" / "expert-drift.png")
    assert "weight versions [1, 2, 3]" in told.stdout.replace("\n", " ")


def test_plot_names_a_torn_file_and_draws_the_rest(tmp_path: Path) -> None:
    saved = snapshot(tmp_path / "saved", [1, 2])
    torn = saved / "part-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    told = CliRunner().invoke(main, ["plot", str(saved), "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert "part-00000.safetensors" in told.stderr
    assert is_picture(tmp_path / "expert-load.png")
    assert not (tmp_path / "expert-drift.png").exists()


def test_plot_of_nothing_is_one_sentence(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["plot", str(tmp_path)])
    assert told.exit_code == 1
    assert "is no snapshot" in " ".join(told.stderr.split())
