"""What importing costs: no engine and no HTTP for a trainer, nothing heavy for the types."""

import importlib
import importlib.util
import subprocess
import sys

import pytest


def loaded(statement: str) -> set[str]:
    """Top-level modules that a new interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import serve_app", {"ray", "torch", "fastapi", "transformers"}),
        (
            "from serve_app import GenerateRequest, RoutedSequence; import serve_app.materialize",
            {"ray", "torch", "fastapi", "transformers"},
        ),
        ("from serve_app import RoutedExpertsClient", {"fastapi", "transformers", "lmdeploy"}),
        ("import serve_app.replay", {"ray", "fastapi"}),
        ("import serve_app.deployments.rollout.loading", {"torch", "transformers", "lmdeploy"}),
    ],
)
def test_heavy_libraries_load_where_they_are_used(statement: str, absent: set[str]) -> None:
    assert not loaded(statement) & absent


PUBLIC = {
    "serve_app": (
        "AsyncRoutedExpertsClient",
        "ExpertBatch",
        "GenerateChunk",
        "GenerateRequest",
        "GenerateResult",
        "RankSlice",
        "RoutedExpertsClient",
        "RoutedSequence",
    ),
    "serve_app.client": ("AsyncRoutedExpertsClient", "RoutedExpertsClient"),
    "serve_app.errors": ("R3Error", "StoreError", "UnknownKey", "RoutesLost", "PrefixMismatch"),
    "serve_app.types": ("BatchSpec", "ExpertBatch", "GenerateRequest", "RankSlice", "StoreStats"),
    "serve_app.config": ("EngineArgs", "RolloutArgs", "StoreArgs", "StoreGraphArgs"),
    "serve_app.records": ("Record", "RecordMeta", "make_record"),
    "serve_app.replay": ("Trace", "TraceVerdict", "check_trace", "replay_routing"),
    "serve_app.wire.registry": ("decode", "encode"),
    "serve_app.wire.expected": ("Expected",),
    "graphs.rollout": ("build",),
    "graphs.store": ("build",),
    "serve_app.ingress.proxy": ("middlewares",),
}
"""What others import, and may go on importing from there."""


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names]
)
def test_public_names_are_where_they_were(module: str, name: str) -> None:
    assert getattr(importlib.import_module(module), name) is not None


def test_both_doors_open_on_the_same_clients() -> None:
    for name in PUBLIC["serve_app.client"]:
        assert getattr(importlib.import_module("serve_app"), name) is getattr(
            importlib.import_module("serve_app.client"), name
        )
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        importlib.import_module("serve_app.client").Nobody  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "serve_app.async_client",
        "serve_app.served",
        "serve_app.weights_parts",
        "serve_app.instruments",
        "serve_app.forcing",
        "serve_app.store.shard",
        "serve_app.store.client",
        "serve_app.engines.loading",
        "serve_app.engines.lmdeploy_slots",
        "serve_app.ingress.gate",
        "serve_app.ingress.chat",
        "serve_app.deployments.engine",
        "serve_app.wire.ours",
    ],
)
def test_old_paths_are_gone(module: str) -> None:
    assert importlib.util.find_spec(module) is None
