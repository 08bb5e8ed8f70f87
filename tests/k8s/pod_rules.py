"""What a schema cannot say of pods, accounts and budgets; each rule yields complaints."""

import re
from collections.abc import Iterator

from tests.k8s.kustomize import Manifest, containers
from tests.k8s.overlay import ROOT, groups, pods


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
    for name, pod in pods(manifests):
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


def what_is_named_exists(manifests: list[Manifest]) -> Iterator[str]:
    """Mounts name volumes, claims and selectors name what is there, images are ones we build."""
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    labels = [pod["metadata"]["labels"] for _, pod in pods(manifests)]
    targets = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    for name, pod in pods(manifests):
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


def pods_are_probed(manifests: list[Manifest]) -> Iterator[str]:
    """KubeRay's own probes need wget in the image; ours are explicit."""
    for name, pod in pods(manifests):
        for container in pod["spec"]["containers"]:
            for probe in ("livenessProbe", "readinessProbe"):
                if probe not in container:
                    yield f"{name}: no {probe}"
