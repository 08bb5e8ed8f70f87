"""One Ray cluster of three raylets and one served graph for all of these tests."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from graphs.rollout import build
from serve_app import RoutedExpertsClient
from serve_app.config import RolloutArgs, StoreArgs
from serve_app.store.access.client import ShardStore, connect
from serve_app.store.access.compat import open_compat
from serve_app.store.owner.directory import open_directory, remove_actors
from tests.store_contract import MakeStore

APP = "rollout"
HTTP_PORT = 8123
ROOT = str(Path(__file__).parents[2])
ROLLOUT_YAML = Path(ROOT) / "graphs" / "rollout.yaml"

Open = Callable[..., tuple[ShardStore, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes: the head (``trainer``), ``engines`` and ``elsewhere``."""
    # The tests' own modules; in a runtime environment every worker would have to be a new process.
    os.environ["PYTHONPATH"] = ROOT
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "resources": {"trainer": 100},
            "object_store_memory": 300 << 20,
            "include_dashboard": False,
            "_system_config": {"metrics_report_interval_ms": 1000},  # of 10,000: tests wait for it
        },
    )
    for name in ("engines", "elsewhere"):
        nodes.add_node(num_cpus=2, resources={name: 100}, object_store_memory=200 << 20)
    ray.init(
        address=nodes.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # Whichever test comes first: Serve takes these options once.
    serve.start(http_options={"host": "127.0.0.1", "port": HTTP_PORT})
    yield nodes
    with suppress(Exception):
        serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
    nodes.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def app(cluster: Cluster, tiny_checkpoint: Path) -> str:
    """The shipped configuration with the tests' small model; returns the application's name."""
    config: dict[str, Any] = yaml.safe_load(ROLLOUT_YAML.read_text())["applications"][0]
    config["args"]["engine"]["model"] = str(tiny_checkpoint)
    config["args"]["engine"]["dtype"] = "float32"
    serve.run(build(RolloutArgs.model_validate(config["args"])), name=APP, route_prefix="/")
    return APP


@pytest.fixture(scope="session")
def client(app: str) -> RoutedExpertsClient:
    return RoutedExpertsClient(app)


@pytest.fixture
def make_store(cluster: Cluster) -> Iterator[MakeStore]:
    """Stores of their own for one test, removed with their actors after it."""
    made: list[str] = []

    def make(app: str = "contract", **args: Any) -> ShardStore:
        open_directory(app, StoreArgs.model_validate(args), 30)
        made.append(app)
        return connect(app)

    yield make
    for app in made:
        remove_actors(app, 30)


@pytest.fixture
def open_store(make_store: MakeStore) -> Open:
    """A store with a ``shared_store`` in the namespace ``lmdeploy``, and a handle to that."""

    def make(**settings: Any) -> tuple[ShardStore, Any]:
        store = make_store(app="compat", **settings)
        assert isinstance(store, ShardStore)
        open_compat("compat", "lmdeploy", StoreArgs.model_validate(settings))
        return store, ray.get_actor("shared_store", namespace="lmdeploy")

    return make
