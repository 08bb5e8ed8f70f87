"""Every overlay against schemas, rules, and the strict check of what it serves.

python -m tests.k8s.check [DIRECTORY]        (part of `make k8s-check`)
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from serve_app.cli.serve_config import check_serve_config
from tests.k8s.kustomize import KustomizeError, Manifest, build
from tests.k8s.overlay import ROOT, ray_service
from tests.k8s.rules import RULES
from tests.k8s.schemas import schema_problems

K8S = ROOT / "k8s"


def overlay_folders(k8s: Path) -> list[Path]:
    """Return the overlays' folders."""
    return sorted(file.parent for file in (k8s / "overlays").glob("*/kustomization.yaml"))


def manifest_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Yield what is wrong with one overlay's manifests; rules only where the rest is right."""
    found = False
    for manifest in manifests:
        name = f"{manifest.get('kind')} {manifest.get('metadata', {}).get('name')}"
        for problem in schema_problems(manifest):
            found = True
            yield f"{name}: {problem}"
    if found:
        return
    config = ray_service(manifests)["spec"].get("serveConfigV2", "")
    if problems := check_serve_config(config, models_elsewhere=True).problems:
        yield from (f"serveConfigV2: {problem}" for problem in problems)
        return
    for rule in RULES:
        for problem in rule(manifests):
            yield f"{rule.__name__}: {problem}"


def tree_problems(k8s: Path) -> Iterator[str]:
    """Yield what is wrong with any overlay under a copy of k8s/."""
    for folder in overlay_folders(k8s):
        try:
            manifests = build(folder)
        except (KustomizeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            yield f"{folder.name}: cannot be built: {error}"
            continue
        for problem in manifest_problems(manifests):
            yield f"{folder.name}: {problem}"


if __name__ == "__main__":
    checked = Path(sys.argv[1]) if len(sys.argv) > 1 else K8S
    problems = list(tree_problems(checked))
    print("\n".join(problems) or f"{len(overlay_folders(checked))} overlays are as they must be")
    sys.exit(bool(problems))
