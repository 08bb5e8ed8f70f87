"""Snapshot, destruction and restore of a real store: the same keys read the same bytes."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.errors import KeyReleased, RoutesLost, UnknownKey
from serve_app.store.access.archive import restore, save
from serve_app.store.access.client import connect
from serve_app.store.owner.directory import find_directory, list_actors, list_shards
from tests.cluster.nodes.actors import EngineLike, pid_of, start
from tests.store_contract import LARGE, SMALL, SMALL_LIKE, MakeStore, read, record

APP = "saved"


def destroy() -> None:
    """Remove the application's actors, so that what comes next is a new store."""
    done = CliRunner().invoke(main, ["store", "destroy", APP])
    assert done.exit_code == 0, done.output
    assert not list_actors(APP)


def filled(make_store: MakeStore) -> tuple[Any, dict[str, list[Any]], str]:
    """A store with small, large, continued and remote records; a released key too."""
    store: Any = make_store(app=APP)
    engine = start(EngineLike, "engines")
    (remote,) = ray.get(engine.put.remote(APP, [7]))
    ray.kill(engine)
    parent = store.put(record(LARGE, seed=1), tag="step-1")
    child = store.put(record(SMALL_LIKE, start=LARGE[0], seed=2), parent=parent, tag="step-1")
    small = store.put(record(SMALL, seed=3))
    gone = store.put(record(SMALL, seed=4))
    store.release([parent, gone])
    keys = [remote, child, small]
    return store, {key: [part.ids.copy() for part in read(store, key)] for key in keys}, parent


def check(store: Any, expected: dict[str, list[Any]]) -> None:
    for key, parts in expected.items():
        for got, put in zip(read(store, key), parts, strict=True):
            np.testing.assert_array_equal(got.ids, put)


def test_the_same_keys_read_in_a_new_store(make_store: MakeStore, tmp_path: Path) -> None:
    store, expected, parent = filled(make_store)
    seen: list[tuple[int, int]] = []
    report = save(store, tmp_path / "snap", progress=lambda done, total: seen.append((done, total)))
    assert report.records == 4
    assert seen[-1] == (4, 4)
    destroy()
    fresh: Any = make_store(app=APP)
    (remote, *_) = expected
    with pytest.raises((RoutesLost, UnknownKey)):
        read(fresh, remote)
    assert restore(fresh, tmp_path / "snap").refused == ()
    check(fresh, expected)
    with pytest.raises(KeyReleased):
        read(fresh, parent)
    assert fresh.stats().live_keys == 3
    assert len(list_shards(APP)) == 1
    assert fresh.release(list(expected)) == 3
    assert fresh.stats().live_bytes == 0


def test_another_process_finds_what_was_restored(make_store: MakeStore, tmp_path: Path) -> None:
    store, expected, _ = filled(make_store)
    save(store, tmp_path / "snap")
    destroy()
    fresh: Any = make_store(app=APP)
    restore(fresh, tmp_path / "snap")
    other = make_store(app=APP)
    (remote, *_) = expected
    assert other.release([remote]) == 1
    with pytest.raises(KeyReleased):
        read(other, remote)


def test_restored_keys_read_after_the_directory_began_anew(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store, expected, _ = filled(make_store)
    save(store, tmp_path / "snap")
    destroy()
    restored: Any = make_store(app=APP)
    restore(restored, tmp_path / "snap")
    directory = find_directory(APP)
    before: Any = ray.get(directory.settings.remote(), timeout=30)
    os.kill(pid_of(directory), signal.SIGKILL)
    fresh: Any = connect(APP, timeout_s=60)
    assert ray.get(directory.settings.remote(), timeout=60) == before
    check(fresh, expected)
    with pytest.raises(UnknownKey):
        read(fresh, next(iter(expected))[:-8] + "madeitup")


def test_a_tag_is_saved_with_what_it_needs(make_store: MakeStore, tmp_path: Path) -> None:
    store, expected, _ = filled(make_store)
    assert save(store, tmp_path / "snap", tag="step-1").records == 2
    destroy()
    fresh: Any = make_store(app=APP)
    restore(fresh, tmp_path / "snap")
    _, child, _ = expected
    check(fresh, {child: expected[child]})
    assert fresh.stats().live_keys == 1


def test_an_altered_file_is_refused_by_name_and_the_rest_restores(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store, expected, _ = filled(make_store)
    save(store, tmp_path / "snap")
    destroy()
    files = sorted((tmp_path / "snap").iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-10])
    fresh: Any = make_store(app=APP)
    report = restore(fresh, tmp_path / "snap")
    assert len(report.refused) == 1
    assert files[0].name in report.refused[0]
    readable = [key for key in expected if isinstance(fresh.fetch([key])[0], list)]
    assert 0 < len(readable) < len(expected)
    check(fresh, {key: expected[key] for key in readable})
