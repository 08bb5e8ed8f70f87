"""Manifests against the schemas of what will read them; keys that a schema lacks are refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from kubernetes_validate import SchemaNotFoundError

from tests.k8s.kustomize import Manifest

KUBERNETES = "1.34"
_SCHEMAS = Path(__file__).parent / "schemas"
_CUSTOM = {
    ("ray.io/v1", "RayService"): "kuberay-1.7.0-rayservice-v1.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitor-v1.json",
}
# A custom resource's schema leaves metadata to Kubernetes; these are what a person writes there.
_METADATA = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "additionalProperties": False,
}


def schema_problems(manifest: Manifest) -> list[str]:
    """Return what a manifest's schema says against it."""
    version, kind = manifest.get("apiVersion"), manifest.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str):
        return [f"expected apiVersion and kind, got {version!r} and {kind!r}"]
    if file := _CUSTOM.get((version, kind)):
        schema = _strict_schema(file)
        found = Draft202012Validator(schema).iter_errors(_with_defaults(manifest, schema))
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}" for error in found]
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    except SchemaNotFoundError as error:
        return [error.message]
    return []


@cache
def _strict_schema(file: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((_SCHEMAS / file).read_text())
    schema["properties"]["metadata"] = _METADATA
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    _close(schema)
    return schema


def _close(schema: Any) -> None:
    """Refuse unknown keys wherever a schema names the known ones."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            _close(value)


def _with_defaults(value: Any, schema: Any) -> Any:
    """Return a copy with the schema's defaults filled in, as the API server does first."""
    if isinstance(value, list):
        return [_with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    filled = {key: _with_defaults(item, known.get(key, {})) for key, item in value.items()}
    for key, part in known.items():
        if "default" in part:
            filled.setdefault(key, part["default"])
    return filled
