"""The pods of a manifest as processes of this machine: `ray start` with what the manifest says."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.k8s.kustomize import Manifest
from tests.k8s.overlay import ROOT, groups, quantity, ray_service
from tests.ports import free_ports

BIN = Path(sys.executable).parent
_PATIENCE_S = 150


@dataclass(frozen=True, slots=True)
class Deployed:
    """Where a manifest's cluster answers, and what a process needs to take part in it."""

    gcs: str
    dashboard: str
    http: str
    metrics: list[str]
    environment: Mapping[str, str]
    folder: Path

    def applications(self) -> dict[str, Any]:
        """Return what Serve says of its applications."""
        answer = requests.get(
            f"{self.dashboard}/api/serve/applications/", headers=self._headers(), timeout=10
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["applications"]
        return found

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}

    def serve_deploy(self) -> None:
        """Deploy the manifest's serveConfigV2, as KubeRay does over the same port."""
        config = str(self.folder / "serve.yaml")
        self.run([str(BIN / "serve"), "deploy", config, "-a", self.dashboard])

    def run_script(self, script: str) -> Any:
        """Run Python in a process of its own; return the JSON that it prints last."""
        told = self.run([sys.executable, "-c", script, self.gcs])
        return json.loads(told.splitlines()[-1])

    def run(self, command: Sequence[str]) -> str:
        """Run a command in the cluster's folder and environment."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait_for(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """Wait until an address answers 200."""
        deadline, tick, last = time.monotonic() + _PATIENCE_S, threading.Event(), "nothing"
        while time.monotonic() < deadline:
            try:
                answer = requests.get(url, headers=headers or self._headers(), timeout=5)
                if answer.status_code == 200:
                    return
                last = f"{answer.status_code} {answer.text[:300]}"
            except requests.RequestException as error:
                last = str(error)
            tick.wait(0.2)
        logs = "".join(log.read_text()[-2000:] for log in self.folder.glob("*.log"))
        raise AssertionError(f"{url}: {last}\n{logs}")


@contextmanager
def deployed(manifests: list[Manifest], model: Path, model_path: str) -> Iterator[Deployed]:
    """Start one raylet a pod group with its own settings, then deploy what the manifest serves.

    Only ports, the spilling directory and the model's place are this machine's.
    """
    with tempfile.TemporaryDirectory(prefix="r3-") as short, ExitStack() as processes:
        folder = Path(short)
        (folder / model_path).parent.mkdir(parents=True)
        (folder / model_path).symlink_to(model)
        config = yaml.safe_load(ray_service(manifests)["spec"]["serveConfigV2"])
        gcs, dashboard, http, clients, *others = free_ports(4 + 2 * len(groups(manifests)))
        config["http_options"]["port"] = http
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        metrics, agents = others[::2], others[1::2]
        token = secrets.token_hex(32)
        cluster = Deployed(
            gcs=f"127.0.0.1:{gcs}",
            dashboard=f"http://127.0.0.1:{dashboard}",
            http=f"http://127.0.0.1:{http}",
            metrics=[f"http://127.0.0.1:{port}/metrics" for port in metrics],
            environment=_environment(groups(manifests)[0], token),
            folder=folder,
        )
        for group, metric, agent in zip(groups(manifests), metrics, agents, strict=True):
            name = group["groupName"]
            command = [*_ray_start(group, folder), f"--metrics-export-port={metric}"]
            command += [f"--dashboard-agent-listen-port={agent}"]
            if name == "head":
                command += ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}"]
                command += [f"--ray-client-server-port={clients}", f"--temp-dir={folder / 'ray'}"]
            else:
                command += [f"--address={cluster.gcs}"]
            environment = _environment(group, token)
            processes.enter_context(_running(command, environment, folder, name))
            # The same probe as in the pod.
            cluster.wait_for(f"http://127.0.0.1:{agent}/api/healthz")
        cluster.wait_for(f"{cluster.dashboard}/api/serve/applications/")
        cluster.serve_deploy()
        cluster.wait_for(f"{cluster.http}/health")
        yield cluster


def _environment(group: dict[str, Any], token: str) -> dict[str, str]:
    """The container's own environment, and the token as KubeRay sets it."""
    container = group["template"]["spec"]["containers"][0]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **{variable["name"]: variable["value"] for variable in container["env"]},
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }


def _ray_start(group: dict[str, Any], folder: Path) -> list[str]:
    """The command as KubeRay builds it: rayStartParams, and CPUs from the container's limit."""
    parameters = dict(group["rayStartParams"])
    spill = folder / f"spill-{group['groupName']}"
    spill.mkdir()
    parameters["object-spilling-directory"] = str(spill)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters.setdefault("num-cpus", str(int(quantity(limits["cpu"]))))
    options = [f"--{name}={value}" for name, value in parameters.items()]
    return [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *options]


@contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, name: str
) -> Iterator[None]:
    """Run a command in its own process group and end the whole group afterwards."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(15)
