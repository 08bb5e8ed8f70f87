"""What another version of r3serve began is refused by name, and goes when it is told to."""

import asyncio
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import ray

from serve_app.client.served import ServedGraph
from serve_app.config import StoreArgs
from serve_app.errors import StoreError
from serve_app.store.access.client import connect
from serve_app.store.access.compat import open_compat
from serve_app.store.owner.directory import (
    COMPAT_NAME,
    NAMESPACE,
    Directory,
    find_compat,
    list_actors,
    open_directory,
    remove_actors,
    shard_name,
)
from serve_app.store.protocol import PROTOCOL
from serve_app.weights.holder import WeightsHolder, newest_weights
from tests.store_contract import MakeStore, read, record

APP = "another"
EARLIER = f"speaks an earlier protocol, this process {PROTOCOL}.*destroy {APP}"
NEXT = f"speaks protocol {PROTOCOL + 1}, this process {PROTOCOL}.*destroy {APP}"


class NextDirectory(Directory):
    """A directory as a later version of r3serve has it."""

    def r3serve_protocol(self) -> int:
        return PROTOCOL + 1


class NextHolder(WeightsHolder):
    """A holder as a later version has it."""

    def r3serve_protocol(self) -> int:
        return PROTOCOL + 1


class EarlierActor:
    """Has the methods that directory, holder and ``shared_store`` had before there was a number.

    What it answers and holds has a class of a module that no longer is where it was.
    """

    def __init__(self) -> None:
        gone = ModuleType("serve_app.store.directory")
        settings = type("Settings", (), {"__module__": gone.__name__})
        vars(gone)["Settings"] = settings
        sys.modules[gone.__name__] = gone
        self._held = settings()
        self._configured = 0

    def settings(self) -> object:
        return self._held

    def newest(self) -> object:
        return self._held

    def configure(self, args: object) -> None:
        self._configured += 1

    def configured(self) -> int:
        return self._configured

    def r3serve_application(self) -> str:
        return APP


def begun(kind: type, name: str, *args: Any, namespace: str = NAMESPACE) -> Any:
    actor: Any = ray.remote(kind)
    made = actor.options(name=name, namespace=namespace, lifetime="detached", num_cpus=0).remote(
        *args
    )
    ray.get(made.__ray_ready__.remote(), timeout=60)
    return made


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: object) -> Iterator[None]:
    yield
    remove_actors(APP, 30)


def test_a_store_of_a_later_version_is_refused_by_name(make_store: MakeStore) -> None:
    made = begun(NextDirectory, shard_name(APP, "directory"), APP, bytes(32), StoreArgs())
    before = ray.get(made.settings.remote(), timeout=30)
    with pytest.raises(StoreError, match=f"the store of '{APP}' {NEXT}"):
        connect(APP)
    with pytest.raises(StoreError, match=NEXT):
        open_directory(APP, StoreArgs(lease_s=5), 30)
    assert ray.get(made.settings.remote(), timeout=30) == before
    assert remove_actors(APP, 30) == 1
    key = make_store(app=APP).put(record())
    assert [found.meta for found in read(connect(APP), key)] == [record().meta]


def test_a_store_begun_before_there_was_a_number_is_refused_by_name(
    make_store: MakeStore,
) -> None:
    made = begun(EarlierActor, shard_name(APP, "directory"))
    with pytest.raises(ray.exceptions.RayError, match=r"serve_app\.store\.directory"):
        ray.get(made.settings.remote(), timeout=30)  # its answer cannot even be read
    with pytest.raises(StoreError, match=f"the store of '{APP}' {EARLIER}"):
        connect(APP)
    with pytest.raises(StoreError, match=EARLIER):
        open_directory(APP, StoreArgs(lease_s=5), 30)
    assert ray.get(made.configured.remote(), timeout=30) == 0
    assert remove_actors(APP, 30) == 1
    assert make_store(app=APP).put(record())


@pytest.mark.parametrize(("kind", "says"), [(EarlierActor, EARLIER), (NextHolder, NEXT)])
def test_a_weights_holder_of_another_version_is_refused_by_name(kind: type, says: str) -> None:
    begun(kind, shard_name(APP, "weights"))
    with pytest.raises(StoreError, match=f"the weights holder of '{APP}' {says}"):
        ServedGraph(APP, None, 30).update_weights({}, 1, "abort")
    with pytest.raises(StoreError, match=says):  # as a replica that starts asks
        asyncio.run(newest_weights(APP))


def test_a_shared_store_of_another_version_is_refused_by_name() -> None:
    made = begun(EarlierActor, COMPAT_NAME, namespace="sglang")
    where = "the shared_store in namespace 'sglang' of"
    with pytest.raises(StoreError, match=f"{where} '{APP}' {EARLIER}"):
        open_compat(APP, "sglang", StoreArgs())
    assert ray.get(made.configured.remote(), timeout=30) == 0
    assert find_compat(APP, "sglang") in list_actors(APP)  # `r3serve store destroy` finds it
