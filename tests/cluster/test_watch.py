"""Actors of a group that are watched: the first that fails is the end of all."""

import os
import signal
import threading
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError

from serve_app.engines.lmdeploy.workers.watch import LIVENESS, Watch

LONG_S, SHORT_S = 60.0, 2.0


class Member:
    """Answers the watch from a thread of its own while a call of its holds the main one."""

    def __init__(self) -> None:
        self._wrong: str | None = None
        self._held = threading.Event()

    @ray.method(concurrency_group=LIVENESS)
    def alive(self) -> str | None:
        return self._wrong

    @ray.method(concurrency_group="aside")
    def fail(self, why: str) -> int:
        self._wrong = why
        return os.getpid()

    def wait(self) -> None:
        self._held.wait()


@pytest.fixture
def members(cluster: Cluster) -> list[Any]:
    options: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {LIVENESS: 1, "aside": 1}}
    actor: Any = ray.remote(**options)(Member)
    made = [actor.remote() for _ in range(2)]
    ray.get([one.alive.remote() for one in made], timeout=60)
    return made


def fails(watch: Watch) -> str:
    """Return why a watch failed, once it has."""
    told, reason = threading.Event(), list[str]()

    def tell(why: str) -> None:
        reason.append(why)
        told.set()

    watch.when_failed(tell)
    assert told.wait(30)
    assert reason == [watch.failed]
    return reason[0]


def test_one_that_says_what_is_wrong_frees_who_waits_for_the_other(members: list[Any]) -> None:
    waiting = members[0].wait.remote()
    watch = Watch("worker", members, LONG_S, SHORT_S)
    watch.up()  # the first is held, and answers all the same
    ray.get(members[1].fail.remote("out of memory"), timeout=30)
    assert fails(watch) == "worker 1: out of memory"
    with pytest.raises(ActorDiedError):
        ray.get(waiting, timeout=30)


def test_one_that_is_killed_ends_the_other(members: list[Any]) -> None:
    watch = Watch("rank", members, LONG_S, SHORT_S)
    waiting = members[1].wait.remote()
    ray.kill(members[0])
    assert fails(watch).startswith("rank 0: ")
    with pytest.raises(ActorDiedError):
        ray.get(waiting, timeout=30)


def test_one_that_is_stopped_is_missed_only_once_the_group_is_up(members: list[Any]) -> None:
    pid = ray.get(members[0].fail.remote(""), timeout=30)  # nothing is wrong
    watch = Watch("worker", members, LONG_S, SHORT_S)
    os.kill(pid, signal.SIGSTOP)
    done, _ = ray.wait([members[1].fail.remote("")], timeout=30)
    assert (done != [], watch.failed) == (True, None)
    watch.up()
    assert fails(watch) == "worker 0 gave no sign of life for 2 s"
