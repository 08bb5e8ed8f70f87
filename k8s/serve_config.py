"""Write each overlay's serve-config.yaml from the Serve config file that graphs/ ships.

python -m k8s.serve_config        (make k8s)
"""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / "k8s" / "overlays"

Changes = dict[str, Any]
"""Dotted paths into the config file, and their values in a cluster."""

_APP = "applications.0.args"
_CLUSTER: Changes = {
    "http_options.host": "0.0.0.0",  # a pod's proxy is reached from other pods
    "logging_config": {"encoding": "JSON"},
}
_KEYS: Changes = {
    f"{_APP}.ingress.api_keys_file": "/etc/r3serve/keys/api",
    f"{_APP}.ingress.admin_keys_file": "/etc/r3serve/keys/admin",
}
_GPU: Changes = {
    f"{_APP}.engine.model": "/models/model",
    f"{_APP}.decoder.serve.max_replicas": 8,
    f"{_APP}.decoder.serve.max_replicas_per_node": 1,  # beside the records of each node
}
_TWICE: Changes = {
    f"{_APP}.engine.serve.min_replicas": 2,
    f"{_APP}.decoder.serve.min_replicas": 2,
    f"{_APP}.ingress.serve.min_replicas": 2,
    f"{_APP}.ingress.serve.max_replicas": 2,
    f"{_APP}.ingress.serve.max_replicas_per_node": 1,
}
SOURCES: dict[str, tuple[str, Changes]] = {
    "cpu-demo": ("rollout.yaml", _CLUSTER),
    "gpu": ("lmdeploy.yaml", _CLUSTER | _KEYS | _GPU),
    "gpu-tp": ("lmdeploy_tp.yaml", _CLUSTER | _KEYS | _GPU),
    "gpu-ep": ("lmdeploy_ep.yaml", _CLUSTER | _KEYS | _GPU),
    "gpu-ha": ("lmdeploy.yaml", _CLUSTER | _KEYS | _GPU | _TWICE),
}


def cluster_config(overlay: str) -> dict[str, Any]:
    """Return an overlay's Serve config: the shipped one, but for what a cluster changes."""
    source, changes = SOURCES[overlay]
    config: dict[str, Any] = yaml.safe_load((ROOT / "graphs" / source).read_text())
    for path, value in changes.items():
        at: Any = config
        *steps, last = path.split(".")
        for step in steps:
            at = at[int(step)] if isinstance(at, list) else at.setdefault(step, {})
        at[last] = value
    return config


def patch_text(overlay: str) -> str:
    """Return the text of an overlay's serve-config.yaml."""
    config = yaml.safe_dump(cluster_config(overlay), sort_keys=False, width=100)
    lines = "".join(f"    {line}\n" for line in config.splitlines())
    return (
        f"# Made by `make k8s` from graphs/{SOURCES[overlay][0]} and k8s/serve_config.py.\n"
        "apiVersion: ray.io/v1\n"
        "kind: RayService\n"
        "metadata:\n"
        "  name: r3serve\n"
        "spec:\n"
        f"  serveConfigV2: |\n{lines}"
    )


if __name__ == "__main__":
    for overlay in SOURCES:
        (OVERLAYS / overlay / "serve-config.yaml").write_text(patch_text(overlay))
