"""One graph in Serve's local testing mode, and an HTTP edge in front of it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve_app import RoutedExpertsClient
from tests.graph.test_rollout_graph import serve_locally
from tests.http_server import LocalGraph, listening

MODEL = "tiny"


@pytest.fixture(scope="session")
def graph(tiny_checkpoint: Path) -> LocalGraph:
    """An engine that records and answers with keys."""
    return LocalGraph(
        tiny_checkpoint, enable_return_routed_experts=True, enable_transfer_obj_ref=True
    )


@pytest.fixture(scope="session")
def lists(tiny_checkpoint: Path) -> LocalGraph:
    """An engine that records and answers with nested lists."""
    return LocalGraph(tiny_checkpoint, enable_return_routed_experts=True)


@pytest.fixture(scope="session")
def url(graph: LocalGraph) -> Iterator[str]:
    """Where an edge without keys or limits listens."""
    with listening(graph.edge(model_name=MODEL, access_log=False)) as at:
        yield at


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path) -> RoutedExpertsClient:
    return serve_locally(
        tiny_checkpoint, enable_return_routed_experts=True, enable_transfer_obj_ref=True
    )


@pytest.fixture
def client(served: RoutedExpertsClient) -> Iterator[RoutedExpertsClient]:
    """The client; a test leaves nothing in the store."""
    yield served
    stats = served.stats()
    assert (stats.live_keys, stats.live_bytes) == (0, 0)
