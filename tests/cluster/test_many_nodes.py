"""Engines, a decoder, trainers and the head on nodes of their own, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL_TALK = 100_000
"""Bytes of headers and answers that are not routes."""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.cluster.nodes.many_nodes"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_a_record_is_written_once_on_the_node_that_produced_it(seen: dict[str, Any]) -> None:
    locality = seen["locality"]
    print(locality)
    for name, written in locality["put"].items():
        own = locality["payload"] // 2 if name.startswith("engines") else 0
        assert own <= written <= own + SMALL_TALK, name


def test_a_ranks_slice_crosses_once_and_nothing_else_big_does(seen: dict[str, Any]) -> None:
    locality = seen["locality"]
    slices, read = locality["slices"], locality["read"]
    # Four ranks, half of the layers and half of the rows each: together the payload, once.
    assert len(slices) == 4
    assert sum(slices) >= locality["payload"]
    into = {"trainers-1": sum(slices[:2]), "trainers-2": sum(slices[2:]), "decoders": 0, "head": 0}
    for name, expected in into.items():
        assert expected <= read[name] <= expected + SMALL_TALK, name
    # No record went from one engine node to the other: they got code and small talk only.
    for name in ("engines-1", "engines-2", "decoders", "head"):
        assert locality["received"][name] < locality["payload"] / 8, name


def test_raylets_come_and_go_under_load(seen: dict[str, Any]) -> None:
    churn = seen["churn"]
    print(churn)
    assert churn["violations"] == []
    for node in ("engines-1", "engines-2", "engines-3"):
        assert churn["outcomes"][f"{node} right"] > 0
    assert churn["outcomes"]["engines-2 RoutesLost"] > 0
    assert churn["left"] == 0
