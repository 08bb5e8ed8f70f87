"""Half a minute of chaos: every answer right or promised, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 480
"""Load, four faults, the end of all leases, and a cluster's start on a busy machine."""


def test_chaos_ends_with_every_answer_right_or_promised() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--minutes", "0.5", "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    assert lines, ran.stderr[-4000:]
    found = json.loads(lines[-1])
    assert ran.returncode == 0, found["examples"]
    faults = {"kill_engine", "kill_decoder", "kill_shard", "kill_raylet"}
    assert faults <= set(found["counts"])
    assert found["counts"]["right"] > 0
