"""What a schema cannot say: rules over one overlay's manifests, each a generator of complaints."""

import importlib.util
import mmap
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ray.scripts.scripts import start

from tests.k8s.kustomize import Manifest, containers

ROOT = Path(__file__).parents[2]
_UNITS = {"": 1, "m": 1e-3, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_PROCESSES = 2 << 30  # what a pod needs beside its shared memory, at the very least


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


def _pods(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in groups(manifests):
        yield group["groupName"], group["template"]
    for manifest in manifests:
        if manifest["kind"] in ("StatefulSet", "Deployment"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def no_secret_is_in_the_tree(manifests: list[Manifest]) -> Iterator[str]:
    """Secrets are made by a person; only their names are here."""
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            yield f"Secret {manifest['metadata']['name']}: make it with kubectl, keep it out of git"
        for container in containers(manifest):
            for variable in container.get("env", ()):
                if re.search("TOKEN$|PASSWORD|SECRET|API_KEY", variable["name"]) and (
                    "value" in variable
                ):
                    yield f"{variable['name']} stands in the manifest: take it from a Secret"


def pods_run_without_privileges(manifests: list[Manifest]) -> Iterator[str]:
    """What the namespace's pod security standard refuses."""
    namespaces = [manifest for manifest in manifests if manifest["kind"] == "Namespace"]
    if any(
        namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted"
        for namespace in namespaces
    ):
        yield "expected the namespace to enforce the restricted standard"
    for name, pod in _pods(manifests):
        spec = pod["spec"]
        context = spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{name}: expected runAsNonRoot and a runAsUser"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: expected the seccomp profile RuntimeDefault"
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: expected allowPrivilegeEscalation: false"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name}: expected all capabilities dropped"


def workers_have_no_rights(manifests: list[Manifest]) -> Iterator[str]:
    """A worker runs the trainer's code too: no token of the Kubernetes API in it."""
    accounts = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "ServiceAccount"}
    if any(manifest["kind"] in ("Role", "ClusterRole") for manifest in manifests):
        yield "expected no roles: nothing of ours talks to the Kubernetes API"
    for group in groups(manifests)[1:]:
        spec = group["template"]["spec"]
        account = accounts.get(spec.get("serviceAccountName", ""))
        if account is None or account.get("automountServiceAccountToken") is not False:
            yield f"{group['groupName']}: expected a ServiceAccount of ours without a token"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{group['groupName']}: expected automountServiceAccountToken: false"


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


def what_is_named_exists(manifests: list[Manifest]) -> Iterator[str]:
    """Mounts name volumes, claims and selectors name what is there, images are ones we build."""
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    labels = [pod["metadata"]["labels"] for _, pod in _pods(manifests)]
    targets = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    for name, pod in _pods(manifests):
        spec = pod["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", ())} | {"data"}
        for volume in spec.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{name}: no claim {claim}"
        for container in spec["containers"]:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    yield f"{name}: no volume {mount['name']}"
            image, _, tag = container["image"].partition(":")
            if image == "r3serve" and tag not in targets:
                yield f"{name}: the Dockerfile has no target {tag!r}, only {targets}"
    for manifest in manifests:
        name, selector = manifest["metadata"]["name"], {}
        if manifest["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selector = manifest["spec"]["selector"]["matchLabels"]
        elif manifest["kind"] == "NetworkPolicy":
            selector = manifest["spec"]["podSelector"]["matchLabels"]
        if not any(selector.items() <= have.items() for have in labels):
            yield f"{manifest['kind']} {name}: selects no pod: {selector}"


def budgets_can_be_kept(manifests: list[Manifest]) -> Iterator[str]:
    """KubeRay's pods have no scale, so a budget takes minAvailable as a number only."""
    least = {group["groupName"]: group.get("minReplicas", 1) for group in groups(manifests)}
    guarded = set()
    for manifest in manifests:
        if manifest["kind"] != "PodDisruptionBudget":
            continue
        spec = manifest["spec"]
        group = spec["selector"]["matchLabels"].get("r3serve/group")
        guarded.add(group)
        if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
            yield f"{manifest['metadata']['name']}: expected minAvailable as a number"
        elif spec["minAvailable"] > least.get(group, 0):
            yield f"{manifest['metadata']['name']}: the group may have fewer pods than that"
    if missing := set(least) - guarded:
        yield f"no PodDisruptionBudget for {sorted(missing)}"


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


def pods_are_probed(manifests: list[Manifest]) -> Iterator[str]:
    """KubeRay's own probes need wget in the image; ours are explicit."""
    for name, pod in _pods(manifests):
        for container in pod["spec"]["containers"]:
            for probe in ("livenessProbe", "readinessProbe"):
                if probe not in container:
                    yield f"{name}: no {probe}"


RULES: tuple[Callable[[list[Manifest]], Iterator[str]], ...] = (
    no_secret_is_in_the_tree,
    pods_run_without_privileges,
    workers_have_no_rights,
    upgrades_keep_the_cluster,
    ray_is_the_locked_one,
    the_head_does_no_work,
    ray_would_start,
    memory_adds_up,
    what_is_named_exists,
    budgets_can_be_kept,
    replicas_find_room,
    pods_wait_for_their_replicas,
    nodes_with_records_stay,
    ray_asks_for_a_token,
    pods_are_probed,
)
