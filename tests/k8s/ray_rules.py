"""What a schema cannot say of Ray and of what it serves; each rule yields complaints."""

import importlib.util
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ray.scripts.scripts import start

from serve_app.deployments.nodes import replicas_on
from tests.k8s.kustomize import Manifest
from tests.k8s.overlay import (
    ROOT,
    engine,
    gpus,
    groups,
    quantity,
    ray_service,
    served,
    worker_nodes,
)

_PROCESSES = 2 << 30  # what a pod needs beside its shared memory, at the very least
_NCCL = 1 << 30  # for each GPU of a pod that has several


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
    """What everybody depends on shares its pod with no replica, and no engine depends on it."""
    head = groups(manifests)[0]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "head: expected num-cpus '0'"
    if gpus(head) or head["rayStartParams"].get("num-gpus", "0") != "0":
        yield "head: expected no GPUs"
    if any(not bundle.get("CPU") for bundle in engine(manifests).placed.bundles):
        yield "head: a part of the engine that asks for no CPU may be placed there"


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
    """At its largest the graph fits the groups at their largest, each engine where it must be."""
    nodes, serve = worker_nodes(manifests), engine(manifests).placed
    found = len(replicas_on(serve, nodes, serve.max_replicas))
    if found < serve.max_replicas:
        yield (
            f"the groups at their largest have room for {found} of {serve.max_replicas} engines of"
            f" {serve.bundles}"
        )
    there = sum(node.resources["CPU"] for node in nodes)
    asked = serve.max_replicas * serve.cpus_per_replica
    for name, part in served(manifests).items():
        options = part.get("serve", {}) if name != "engine" else {}
        asked += options.get("max_replicas", 1) * options.get("num_cpus", 0)
    if asked > there:
        yield f"the graph asks for {asked:g} CPUs at its largest, the groups have {there:g}"


def gpus_of_a_pod_share_memory(manifests: list[Manifest]) -> Iterator[str]:
    """NCCL's buffers between the GPUs of a pod are in /dev/shm, beside the object store."""
    for group in groups(manifests):
        if gpus(group) < 2:
            continue
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        left = quantity(volumes["shared-memory"]["emptyDir"].get("sizeLimit", 0)) - store
        if left < gpus(group) * _NCCL:
            yield (
                f"{group['groupName']}: /dev/shm has {left:,.0f} beside the object store: expected"
                f" {_NCCL:,} for each of {gpus(group):g} GPUs"
            )


def pods_wait_for_their_replicas(manifests: list[Manifest]) -> Iterator[str]:
    """A pod that ends before its replicas have finished cuts their rollouts off."""
    serve = engine(manifests).placed
    wait = serve.graceful_shutdown_timeout_s
    for group in groups(manifests)[1:]:
        if serve.gpus_per_replica and not gpus(group):
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
