"""What importing costs: no engine and no HTTP for a trainer, nothing heavy for the types."""

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
