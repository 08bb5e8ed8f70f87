"""`make k8s-check`: what ships is right, and a broken copy of every file is found out."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml

from k8s.serve_config import OVERLAYS, SOURCES, cluster_config, patch_text
from tests.k8s.check import K8S, manifest_problems, overlay_folders, tree_problems
from tests.k8s.kustomize import Manifest, build, read_all
from tests.k8s.overlay import ray_service
from tests.k8s.rules import RULES
from tests.k8s.schemas import schema_problems

NAMES = [folder.name for folder in overlay_folders(K8S)]
FILES = sorted(file.relative_to(K8S) for file in K8S.rglob("*.yaml"))


@cache
def _built(overlay: str) -> str:
    return json.dumps(build(K8S / "overlays" / overlay))


def built(overlay: str) -> list[Manifest]:
    """A copy of an overlay's manifests that a test may break."""
    manifests: list[Manifest] = json.loads(_built(overlay))
    return manifests


@pytest.mark.parametrize("overlay", NAMES)
def test_what_ships_is_as_it_must_be(overlay: str) -> None:
    assert list(manifest_problems(built(overlay))) == []


def test_every_overlay_serves_what_graphs_ship_but_for_named_changes() -> None:
    assert set(SOURCES) == set(NAMES)
    for overlay in NAMES:
        carried = ray_service(built(overlay))["spec"]["serveConfigV2"]
        assert yaml.safe_load(carried) == cluster_config(overlay), "run `make k8s`"
        written = (OVERLAYS / overlay / "serve-config.yaml").read_text()
        assert written == patch_text(overlay), "graphs/ changed: run `make k8s`"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_broken_copy_of_each_file_is_found_out(file: Path, tmp_path: Path) -> None:
    for number in range(len(read_all(K8S / file))):
        copy = tmp_path / str(number)
        shutil.copytree(K8S, copy)
        documents = read_all(copy / file)
        documents[number] = _broken(documents[number])
        (copy / file).write_text(yaml.safe_dump_all(documents))
        problem = next(tree_problems(copy), None)
        assert problem is not None, f"document {number} of {file}"


def _broken(document: Any) -> Any:
    """Misspell one thing: a patch's path, a key that must be known, or a key of the config."""
    if isinstance(document, list):
        document[0]["path"] += "x/y"
    elif "serveConfigV2" in document.get("spec", ()):
        document["spec"]["serveConfigV2"] += "proxy_locatoin: EveryNode\n"
    else:
        document.get("spec", document)["surprise"] = 1
    return document


def test_every_kind_is_checked_for_unknown_keys_and_types() -> None:
    seen = set()
    for overlay in NAMES:
        for manifest in built(overlay):
            seen.add(manifest["kind"])
            assert schema_problems(manifest | {"surprise": 1}) != []
            assert schema_problems(manifest | {"metadata": {"name": 7}}) != []
            assert schema_problems(manifest | {"apiVersion": "v9"}) != []
    assert {"RayService", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor"} <= seen


def test_deep_inside_a_pod_template_too() -> None:
    manifest = ray_service(built("gpu"))
    container = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"][
        "containers"
    ][0]
    container["resorces"] = {}
    container["ports"][0]["containerPort"] = "http"
    found = " ".join(schema_problems(manifest))
    assert "resorces" in found
    assert "containerPort" in found


SPEC = "/spec/rayClusterConfig"
HEAD = f"{SPEC}/headGroupSpec"
CPU = f"{SPEC}/workerGroupSpecs/0"
GPU = f"{SPEC}/workerGroupSpecs/1"
POD = "template/spec"
BREAKS: list[tuple[str, str, str, Any]] = [
    ("no_secret_is_in_the_tree", "RayService", f"{HEAD}/{POD}/containers/0/env/-",
     {"name": "REDIS_PASSWORD", "value": "x"}),
    ("pods_run_without_privileges", "RayService", f"{CPU}/{POD}/securityContext", {}),
    ("pods_run_without_privileges", "RayService",
     f"{GPU}/{POD}/containers/0/securityContext/capabilities", {"drop": []}),
    ("pods_run_without_privileges", "Namespace", "/metadata/labels", {}),
    ("pods_run_without_privileges", "StatefulSet", f"/spec/{POD}/securityContext", {}),
    ("workers_have_no_rights", "ServiceAccount", "/automountServiceAccountToken", True),
    ("workers_have_no_rights", "RayService", f"{CPU}/{POD}/serviceAccountName", "default"),
    ("upgrades_keep_the_cluster", "RayService", "/spec/upgradeStrategy", {"type": "NewCluster"}),
    ("upgrades_keep_the_cluster", "RayService", f"{SPEC}/upgradeStrategy", {"type": "None"}),
    ("ray_is_the_locked_one", "RayService", f"{SPEC}/rayVersion", "2.40.0"),
    ("the_head_does_no_work", "RayService", f"{HEAD}/rayStartParams/num-cpus", "2"),
    ("the_head_does_no_work", "RayService", f"{HEAD}/rayStartParams/num-gpus", "1"),
    ("ray_would_start", "RayService", f"{CPU}/rayStartParams/object-store-memroy", "1"),
    ("ray_would_start", "RayService", f"{CPU}/{POD}/containers/0/env/-",
     {"name": "RAY_helth_check_period_ms", "value": "1"}),
    ("ray_would_start", "RayService", f"{GPU}/{POD}/containers/0/env/0/value", "3000"),
    ("memory_adds_up", "RayService", f"{CPU}/rayStartParams/object-store-memory", "99999999999"),
    ("memory_adds_up", "RayService", f"{GPU}/{POD}/volumes/0/emptyDir", {}),
    ("memory_adds_up", "RayService", f"{HEAD}/{POD}/containers/0/resources/limits/memory", "3Gi"),
    ("memory_adds_up", "RayService", f"{CPU}/rayStartParams/object-spilling-directory", "/var"),
    ("what_is_named_exists", "RayService", f"{CPU}/{POD}/volumes/0/name", "other"),
    ("what_is_named_exists", "RayService", f"{CPU}/{POD}/containers/0/image", "r3serve:none"),
    ("what_is_named_exists", "PersistentVolumeClaim", "/metadata/name", "other"),
    ("what_is_named_exists", "PodMonitor", "/spec/selector/matchLabels", {"a": "b"}),
    ("what_is_named_exists", "NetworkPolicy", "/spec/podSelector/matchLabels", {"a": "b"}),
    ("budgets_can_be_kept", "PodDisruptionBudget", "/spec/maxUnavailable", 1),
    ("budgets_can_be_kept", "PodDisruptionBudget", "/spec/minAvailable", "50%"),
    ("budgets_can_be_kept", "PodDisruptionBudget", "/spec/minAvailable", 9),
    ("replicas_find_room", "RayService", f"{GPU}/maxReplicas", 1),
    ("pods_wait_for_their_replicas", "RayService",
     f"{GPU}/{POD}/terminationGracePeriodSeconds", 60),
    ("nodes_with_records_stay", "RayService", f"{SPEC}/autoscalerOptions/idleTimeoutSeconds", 60),
    ("nodes_with_records_stay", "RayService", f"{SPEC}/autoscalerOptions/version", "v1"),
    ("ray_asks_for_a_token", "RayService", f"{SPEC}/authOptions/mode", "disabled"),
    ("pods_are_probed", "RayService", f"{CPU}/{POD}/containers/0/livenessProbe", None),
]  # fmt: skip
LIMITS = f"{GPU}/{POD}/containers/0/resources/limits"
GROUP_BREAKS: list[tuple[str, str, str, Any]] = [
    # Fourteen GPUs in the cluster, and no pod for a group of eight.
    ("replicas_find_room", "RayService", f"{LIMITS}/nvidia.com~1gpu", "7"),
    ("replicas_find_room", "RayService", f"{LIMITS}/cpu", "8"),
    ("replicas_find_room", "RayService", f"{GPU}/maxReplicas", 1),
    ("gpus_of_a_pod_share_memory", "RayService", f"{GPU}/{POD}/volumes/0/emptyDir/sizeLimit",
     "65Gi"),
    ("the_head_does_no_work", "RayService",
     f"{HEAD}/{POD}/containers/0/resources/limits/nvidia.com~1gpu", "1"),
    ("pods_wait_for_their_replicas", "RayService",
     f"{GPU}/{POD}/terminationGracePeriodSeconds", 60),
]  # fmt: skip
CASES = [("gpu-ha", *case) for case in BREAKS] + [("gpu-ep", *case) for case in GROUP_BREAKS]


@pytest.mark.parametrize(("overlay", "rule", "kind", "path", "value"), CASES)
def test_each_rule_finds_what_a_schema_cannot(
    overlay: str, rule: str, kind: str, path: str, value: object
) -> None:
    manifests = built(overlay)
    manifest = next(manifest for manifest in manifests if manifest["kind"] == kind)
    change = {"op": "add", "path": path, "value": value}
    if value is None:
        change = {"op": "remove", "path": path}
    jsonpatch.apply_patch(manifest, [change], in_place=True)
    (broken,) = (one for one in RULES if one.__name__ == rule)
    assert list(broken(manifests)) != []


def test_no_rule_is_left_without_a_case() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for _, rule, *_ in CASES}
