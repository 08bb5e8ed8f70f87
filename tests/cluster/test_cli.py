"""Serve's own command line on the shipped config: run, build, deploy, status."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.cluster.conftest import ROLLOUT_YAML, ROOT
from tests.ports import free_ports

BIN = Path(sys.executable).parent
MODEL = "checkpoints/tiny-qwen3-moe"

TRAINER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
from serve_app import GenerateRequest, RoutedExpertsClient
client = RoutedExpertsClient("rollout")
if len(sys.argv) == 2:
    print(client.generate(GenerateRequest(
        input_ids=[5, 6, 7], max_new_tokens=4, ignore_eos=True, return_routed_experts=True
    )).routed_experts)
else:
    print(client.get(sys.argv[2]).ids.shape)
"""


def output(command: Sequence[str], cwd: Path) -> str:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def running(command: Sequence[str], cwd: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in its own process group and end the whole group afterwards."""
    with (cwd / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": ROOT, "RAY_ADDRESS": "", **env},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def wait_for_answer(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until an address answers 200; fail with the log when the process ends first."""
    deadline, tick = time.monotonic() + 300, threading.Event()
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(url, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        tick.wait(0.2)
    raise AssertionError((folder / "log").read_text()[-4000:])


@pytest.fixture
def shipped(tmp_path: Path, tiny_checkpoint: Path) -> tuple[Path, dict[str, Any], int]:
    """A folder with the config file, the model where the file expects it, and a free port."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / MODEL).symlink_to(tiny_checkpoint)
    config: dict[str, Any] = yaml.safe_load(ROLLOUT_YAML.read_text())
    assert config["applications"][0]["args"]["engine"]["model"] == MODEL
    (config["http_options"]["port"],) = free_ports(1)
    (tmp_path / "rollout.yaml").write_text(yaml.safe_dump(config))
    return tmp_path, config, config["http_options"]["port"]


def test_serve_build_writes_the_shipped_graph(
    shipped: tuple[Path, dict[str, Any], int],
) -> None:
    folder, _, _ = shipped
    output(["serve", "build", "graphs.rollout:app", "-o", "built.yaml"], folder)
    (application,) = yaml.safe_load((folder / "built.yaml").read_text())["applications"]
    names = {deployment["name"] for deployment in application["deployments"]}
    assert names == {"Ingress", "InferenceEngine", "ExpertDecoder", "ExpertStore"}


def test_serve_run(shipped: tuple[Path, dict[str, Any], int]) -> None:
    folder, _, port = shipped
    with running(["serve", "run", "rollout.yaml", "-a", "local"], folder) as process:
        wait_for_answer(f"http://127.0.0.1:{port}/health", process, folder)
        body: dict[str, Any] = {
            "input_ids": [5, 6, 7],
            "max_tokens": 3,
            "return_routed_experts": True,
        }
        answer = requests.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60).json()
        assert isinstance(answer["meta_info"]["routed_experts"], str)


def test_serve_run_without_a_gpu_says_so_in_one_sentence(
    shipped: tuple[Path, dict[str, Any], int],
) -> None:
    folder, _, port = shipped
    config = yaml.safe_load((ROLLOUT_YAML.parent / "lmdeploy.yaml").read_text())
    config["http_options"]["port"] = port
    (folder / "lmdeploy.yaml").write_text(yaml.safe_dump(config))
    said = folder / "log"
    command = ["serve", "run", "lmdeploy.yaml", "-a", "local"]
    with running(command, folder, CUDA_VISIBLE_DEVICES="") as process:
        deadline, tick = time.monotonic() + 120, threading.Event()
        while "asks for 1 GPU a replica and this cluster has 0" not in said.read_text():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            tick.wait(0.2)
    assert "Traceback" not in said.read_text()


def test_serve_deploy_and_redeploy_keep_every_key(
    shipped: tuple[Path, dict[str, Any], int],
) -> None:
    folder, config, port = shipped
    gcs, dashboard, agent, metrics, clients = map(str, free_ports(5))
    start = ["ray", "start", "--head", "--block", "--num-cpus=3", f"--port={gcs}"]
    start += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    start += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={clients}"]
    start += ["--disable-usage-stats", "--object-store-memory=200000000"]
    at = f"http://127.0.0.1:{dashboard}"
    trainer = [str(BIN / "python"), "-c", TRAINER, f"127.0.0.1:{gcs}"]
    with running(start, folder) as process:
        wait_for_answer(f"{at}/api/serve/applications/", process, folder)
        output(["serve", "deploy", "rollout.yaml", "-a", at], folder)
        wait_for_answer(f"http://127.0.0.1:{port}/health", process, folder)
        assert "RUNNING" in output(["serve", "status", "-a", at], folder)
        key = output(trainer, folder).strip()
        config["applications"][0]["args"]["engine"]["max_batch_size"] = 3
        config["applications"][0]["args"]["store"]["lease_s"] = 1800
        (folder / "rollout.yaml").write_text(yaml.safe_dump(config))
        output(["serve", "deploy", "rollout.yaml", "-a", at], folder)
        wait_for_answer(f"http://127.0.0.1:{port}/health", process, folder)
        assert output([*trainer, key], folder).strip() == "(6, 4, 4)"
