"""As much of kustomize as k8s/ uses, for machines without kubectl.

resources (files and directories), namespace, labels.pairs, images (newName, newTag), patches
(merge patches of custom resources; JSON patches with a target of kind and name). Anything else in a
kustomization.yaml is refused. `kustomize_sample/` proves it against the output of kubectl.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "patches", "images"}
_CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}


class KustomizeError(Exception):
    """A kustomization that cannot be built, or that uses what this module does not know."""


def build(folder: Path) -> list[Manifest]:
    """Return what `kubectl kustomize FOLDER` prints."""
    config = _read_one(folder / "kustomization.yaml")
    if unknown := set(config) - _KNOWN:
        raise KustomizeError(f"{folder.name}: not known here: {sorted(unknown)}")
    manifests = [manifest for name in config["resources"] for manifest in _resource(folder / name)]
    for patch in config.get("patches", ()):
        _patch(manifests, folder, patch)
    for manifest in manifests:
        _transform(manifest, config)
    names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in manifests]
    if len(set(names)) < len(names):
        raise KustomizeError(f"{folder.name}: two resources have one name: {names}")
    return manifests


def _resource(path: Path) -> list[Manifest]:
    if path.is_dir():
        return build(path)
    return read_all(path)


def read_all(path: Path) -> list[Manifest]:
    """Return a file's documents, anchors resolved into copies."""
    try:
        loaded = list(yaml.safe_load_all(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise KustomizeError(f"{path.name}: {error}") from None
    # By way of JSON, since an anchor's aliases are one object and a patch would change them all.
    return [json.loads(json.dumps(document)) for document in loaded if document is not None]


def _read_one(path: Path) -> Any:
    (document,) = read_all(path)
    return document


def _patch(manifests: list[Manifest], folder: Path, patch: dict[str, Any]) -> None:
    body = _read_one(folder / patch["path"])
    target = patch.get("target") or {
        "kind": body["kind"],
        "name": re.escape(body["metadata"]["name"]),
    }
    found = [manifest for manifest in manifests if _is_target(manifest, target)]
    if not found:
        raise KustomizeError(f"{patch['path']}: nothing of {target} to patch")
    for manifest in found:
        if isinstance(body, list):
            try:
                jsonpatch.apply_patch(manifest, body, in_place=True)
            except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
                raise KustomizeError(f"{patch['path']}: {error}") from None
        elif "." in manifest["apiVersion"].partition("/")[0]:
            _merge(manifest, body)
        else:
            raise KustomizeError(f"{patch['path']}: merge patches are for custom resources only")


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    if unknown := set(target) - {"kind", "name"}:
        raise KustomizeError(f"not known here in a patch's target: {sorted(unknown)}")
    kind, name = target.get("kind", ".*"), target.get("name", ".*")
    return bool(
        re.fullmatch(kind, manifest["kind"]) and re.fullmatch(name, manifest["metadata"]["name"])
    )


def _merge(into: dict[str, Any], patch: dict[str, Any]) -> None:
    """Apply a JSON merge patch (RFC 7386)."""
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _transform(manifest: Manifest, config: dict[str, Any]) -> None:
    metadata = manifest["metadata"]
    if "namespace" in config and manifest["kind"] not in _CLUSTER_WIDE:
        metadata["namespace"] = config["namespace"]
    for labels in config.get("labels", ()):
        if set(labels) != {"pairs"}:
            raise KustomizeError(f"not known here in labels: {sorted(set(labels) - {'pairs'})}")
        metadata["labels"] = metadata.get("labels", {}) | labels["pairs"]
    for image in config.get("images", ()):
        for container in containers(manifest):
            name, _, tag = container["image"].partition(":")
            if name == image["name"]:
                tag = image.get("newTag", tag)
                container["image"] = f"{image.get('newName', name)}:{tag}".removesuffix(":")


def containers(at: Any) -> Iterator[dict[str, Any]]:
    """Yield every container in a manifest, wherever its pods are described."""
    if isinstance(at, list):
        for item in at:
            yield from containers(item)
    elif isinstance(at, dict):
        for key, value in at.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                yield from value
            else:
                yield from containers(value)
