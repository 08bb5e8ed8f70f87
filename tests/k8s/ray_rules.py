"""What a schema cannot say of Ray and of what it serves; each rule yields complaints."""

import importlib.util
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ray.scripts.scripts import start

from tests.k8s.kustomize import Manifest
from tests.k8s.overlay import ROOT, groups, quantity, ray_service, served

_PROCESSES = 2 << 30  # what a pod needs beside its shared memory, at the very least


def upgrades_keep_the_cluster(manifests: list[Manifest]) -> Iterator[str]:
    """A second cluster would drop every record."""
    spec = ray_service(manifests)["spec"]
    if spec.get("upgradeStrategy") != {"type": "None"}:
        yield "expected upgradeStrategy None"
    if "upgradeStrategy" in spec["rayClusterConfig"]:
        yield "KubeRay refuses rayClusterConfig.upgradeStrategy in a RayService"


def ray_is_the_locked_one(manifests: list[Manifest]) -> Iterator[str]:
    """KubeRay decides by this version how it talks to Ray."""
    locked = set()
    for file in ("cpu.txt", "cuda.txt"):
        text = (ROOT / "constraints" / file).read_text()
        locked |= set(re.findall(r"^ray==(\S+)", text, re.M))
    found = ray_service(manifests)["spec"]["rayClusterConfig"].get("rayVersion")
    if {found} != locked:
        yield f"expected rayVersion {sorted(locked)} as in constraints/, got {found}"


def the_head_does_no_work(manifests: list[Manifest]) -> Iterator[str]:
    """What everybody depends on shares its pod with no replica."""
    if groups(manifests)[0]["rayStartParams"].get("num-cpus") != "0":
        yield "head: expected num-cpus '0'"


def ray_would_start(manifests: list[Manifest]) -> Iterator[str]:
    """Each of rayStartParams is an option of `ray start`, each RAY_ setting one that Ray reads."""
    options = {flag.removeprefix("--") for option in start.params for flag in option.opts}
    settings = []
    for group in groups(manifests):
        for name in sorted(set(group["rayStartParams"]) - options):
            yield f"{group['groupName']}: `ray start` has no --{name}"
        if "object-spilling-directory" not in group["rayStartParams"]:
            yield f"{group['groupName']}: expected an object-spilling-directory"
        env = {v["name"]: v.get("value") for v in group["template"]["spec"]["containers"][0]["env"]}
        health = {name: value for name, value in env.items() if "health_check" in name}
        settings.append(health)
        for name in env:
            if name.startswith("RAY_") and name[4].islower() and not _ray_reads(name[4:]):
                yield f"{group['groupName']}: Ray reads no {name}"
    expected = {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_timeout_ms": "1000",
    }
    if any(found != expected for found in settings):
        yield f"expected these health checks in every group: {expected}"


@cache
def _ray_reads(setting: str) -> bool:
    for module in ("ray._private.serialization", "ray._private.ray_constants", "ray._raylet"):
        found = importlib.util.find_spec(module)
        assert found is not None
        assert found.origin is not None
        with (
            Path(found.origin).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code,
        ):
            if code.find(setting.encode()) >= 0:
                return True
    return False


def memory_adds_up(manifests: list[Manifest]) -> Iterator[str]:
    """Object store < /dev/shm < memory, and room for a budget that is set."""
    budget = served(manifests).get("store", {}).get("byte_budget") or 0
    for group in groups(manifests):
        name, spec = group["groupName"], group["template"]["spec"]
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        memory = quantity(spec["containers"][0]["resources"]["limits"]["memory"])
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in spec["containers"][0]["volumeMounts"]}
        shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        shm = quantity(shared.get("sizeLimit", 0))
        if shared.get("medium") != "Memory" or not 0 < store < shm:
            yield f"{name}: object store {store:,} does not fit into /dev/shm {shm:,.0f}"
        if shm + _PROCESSES > memory:
            yield f"{name}: /dev/shm {shm:,.0f} leaves too little of memory {memory:,.0f}"
        if name != "head" and budget > store // 2:
            yield f"{name}: byte_budget {budget:,} is more than half of the store {store:,}"
        if group["rayStartParams"].get("object-spilling-directory") not in mounts:
            yield f"{name}: the spilling directory is no volume: it would fill the node's disk"


def replicas_find_room(manifests: list[Manifest]) -> Iterator[str]:
    """At its largest the graph fits the groups at their largest."""
    room = {"num_cpus": 0.0, "num_gpus": 0.0}
    for group in groups(manifests)[1:]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        room["num_cpus"] += group["maxReplicas"] * quantity(limits.get("cpu", 0))
        room["num_gpus"] += group["maxReplicas"] * quantity(limits.get("nvidia.com/gpu", 0))
    for kind, there in room.items():
        asked = 0.0
        for part in served(manifests).values():
            options = part.get("serve", {}) if isinstance(part, dict) else {}
            asked += options.get("max_replicas", 1) * options.get(kind, 0)
        if asked > there:
            yield f"the graph asks for {asked:g} {kind} at its largest, the groups have {there:g}"


def pods_wait_for_their_replicas(manifests: list[Manifest]) -> Iterator[str]:
    """A pod that ends before its replicas have finished cuts their rollouts off."""
    engine = served(manifests).get("engine", {}).get("serve", {})
    wait = engine.get("graceful_shutdown_timeout_s", 20)
    for group in groups(manifests)[1:]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        if engine.get("num_gpus", 0) and "nvidia.com/gpu" not in limits:
            continue  # no engine runs there
        grace = group["template"]["spec"].get("terminationGracePeriodSeconds", 30)
        if grace <= wait:
            yield f"{group['groupName']}: pods end after {grace} s, engines finish within {wait} s"


def nodes_with_records_stay(manifests: list[Manifest]) -> Iterator[str]:
    """The autoscaler does not see small records in a shard: it must wait longer than a lease."""
    cluster = ray_service(manifests)["spec"]["rayClusterConfig"]
    if cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "expected autoscaler v2"
    idle = cluster.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 60)
    lease = served(manifests).get("store", {}).get("lease_s", 3600)
    if idle <= lease:
        yield f"idleTimeoutSeconds {idle} is not longer than the lease of {lease} s"


def ray_asks_for_a_token(manifests: list[Manifest]) -> Iterator[str]:
    """Whoever reaches Ray without one may run any code."""
    auth = ray_service(manifests)["spec"]["rayClusterConfig"].get("authOptions", {})
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield "expected authOptions: mode token, with the name of a Secret"
