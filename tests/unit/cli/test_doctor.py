"""`r3serve doctor`: what each check says of good and of bad machines."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.cli.machine import (
    Verdict,
    authentication,
    examine,
    package_version,
    port_use,
    shared_memory,
)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("2.58.1", "ok"), ("2.60.0+local", "ok"), ("2.61.0", "wrong"), (None, "wrong")],
)
def test_a_version_outside_its_range_is_wrong_and_says_what_to_install(
    found: str | None, verdict: Verdict
) -> None:
    finding = package_version("ray", found, ">=2.58.1,<2.61", "pip install it")
    assert finding.verdict == verdict
    assert ("pip install it" in finding.advice) == (verdict == "wrong")


def test_shared_memory_must_hold_the_object_store() -> None:
    assert shared_memory(8 << 30, 16 << 30).verdict == "ok"
    small = shared_memory(64 << 20, 16 << 30)
    assert small.verdict == "warning"
    assert "--shm-size=4915m" in small.advice


def test_a_taken_port_names_the_setting() -> None:
    assert port_use(8000, taken=False).verdict == "ok"
    assert "http_options.port" in port_use(8000, taken=True).advice


@pytest.mark.parametrize(
    ("environment", "has_file", "verdict"),
    [
        ({}, False, "warning"),
        ({"RAY_AUTH_MODE": "disabled"}, False, "ok"),
        ({"RAY_AUTH_MODE": "token"}, False, "wrong"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, False, "ok"),
    ],
)
def test_auth_needs_a_mode_and_a_token(
    environment: dict[str, str], has_file: bool, verdict: Verdict, tmp_path: Path
) -> None:
    file = tmp_path / "auth_token"
    if has_file:
        file.write_text("secret")
    finding = authentication(environment, file)
    assert finding.verdict == verdict
    assert "secret" not in f"{finding.found}{finding.advice}"


def test_harmful_switches_are_named() -> None:
    switches = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    named = {finding.what for finding in examine(switches) if finding.verdict == "warning"}
    assert set(switches) <= named


def test_the_command_finds_this_machine_fit_and_fails_without_a_token() -> None:
    told = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert "object store would take" in told.stdout
    told = CliRunner().invoke(
        main, ["doctor"], env={"RAY_AUTH_MODE": "token", "HOME": "/nonexistent", "COLUMNS": "200"}
    )
    assert told.exit_code == 1
    assert "there is no token" in told.stdout


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = CliRunner().invoke(main, ["doctor", "--address", f"127.0.0.1:{port}"])
    assert told.exit_code == 1
    assert "no Ray cluster" in told.stderr
