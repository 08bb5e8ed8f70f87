"""One overlay's manifests, and what rules ask of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import MODELS_ELSEWHERE, EngineArgs, RolloutArgs
from serve_app.deployments.nodes import Node
from tests.k8s.kustomize import Manifest

ROOT = Path(__file__).parents[2]
_UNITS = {"": 1, "m": 1e-3, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def quantity(text: str | int | float) -> float:
    """Return a Kubernetes quantity as a number: 1536Mi, 500m, 2."""
    found = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"expected a quantity, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def ray_service(manifests: list[Manifest]) -> Manifest:
    """Return the overlay's RayService."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == "RayService")
    return found


def groups(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Return the head group, named ``head``, and the worker groups."""
    cluster = ray_service(manifests)["spec"]["rayClusterConfig"]
    return [{"groupName": "head", **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"]]


def served(manifests: list[Manifest]) -> dict[str, Any]:
    """Return the arguments of the application in serveConfigV2."""
    config = yaml.safe_load(ray_service(manifests)["spec"]["serveConfigV2"])
    args: dict[str, Any] = config["applications"][0]["args"]
    return args


def engine(manifests: list[Manifest]) -> EngineArgs:
    """Return the engine's part of them."""
    return RolloutArgs.model_validate(served(manifests), context=MODELS_ELSEWHERE).engine


def worker_nodes(manifests: list[Manifest]) -> list[Node]:
    """Return the nodes that Ray has when every worker group is at its largest."""
    return [
        Node(f"{group['groupName']}-{number}", _ray_resources(group))
        for group in groups(manifests)[1:]
        for number in range(group["maxReplicas"])
    ]


def _ray_resources(group: dict[str, Any]) -> dict[str, float]:
    """Return what KubeRay tells `ray start` that a pod has."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {"CPU": quantity(limits.get("cpu", 0)), "GPU": gpus(group)}


def gpus(group: dict[str, Any]) -> float:
    """Return how many GPUs each of a group's pods has."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return quantity(limits.get("nvidia.com/gpu", 0))


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template with its group's or controller's name."""
    for group in groups(manifests):
        yield group["groupName"], group["template"]
    for manifest in manifests:
        if manifest["kind"] in ("StatefulSet", "Deployment"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]
