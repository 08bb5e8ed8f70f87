"""`r3serve trace`: a table of it, and in one line whether replay happened."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.replay.verdict import FORMAT


def write(path: Path, used: list[int], **changes: Any) -> str:
    line: dict[str, Any] = {"sequence": 3, "row": 7, "layer": 0, "valid": True, "weight_version": 2}
    line |= {"recorded": [5, 6], "sliced": [6, 5], "used": used, **changes}
    lines = (
        FORMAT,
        {"pass": 1, "rows": 1, "layers": [0]},
        line,
        {"lines": 1, "error": None},
    )
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def test_the_table_shows_the_three_sides(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["trace", write(tmp_path / "t.jsonl", [5, 6])])
    assert told.exit_code == 0
    assert [word for word in ("recorded", "sliced", "6, 5", "7") if word not in told.stdout] == []


@pytest.mark.parametrize(
    ("used", "changes", "code", "says"),
    [
        ([5, 6], {}, 0, "replay happened: 1 rows replayed, 0 routed natively, 0 mismatches"),
        ([5, 7], {}, 1, "did not happen: 0 rows replayed, .* sequence 3, row 7, layer 0: .*5, 7"),
        ([5, 7], {"valid": False}, 1, "did not happen: 0 rows replayed, 1 routed natively"),
    ],
)
def test_check_says_it_in_one_line(
    tmp_path: Path, used: list[int], changes: dict[str, Any], code: int, says: str
) -> None:
    path = write(tmp_path / "t.jsonl", used, **changes)
    told = CliRunner().invoke(main, ["trace", path, "--check"])
    assert told.exit_code == code
    assert told.output.count("\n") == 1
    assert re.search(says, told.output), told.output


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_what_is_no_trace_is_one_sentence(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("{}\n")
    told = CliRunner().invoke(main, ["trace", str(path), *options])
    assert told.exit_code == 1
    assert "is no trace" in " ".join(told.stderr.split())
