"""A group whose member is killed or stopped under load: what its clients see, and what is left."""

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray._private.state import state as cluster_state

from serve_app import RoutedExpertsClient
from serve_app.errors import EngineUnavailable, RoutesLost
from serve_app.records import Record
from serve_app.types import GenerateRequest, GenerateResult
from tests.eventually import eventually
from tests.lmdeploy.served.replicas import members, pid_of

REPLACED_S = 300.0


def kill(pid: int) -> None:
    """End a member's process at once."""
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """Let a member's process do nothing any more, though it lives."""
    os.kill(pid, signal.SIGSTOP)


def lose_a_member(
    client: RoutedExpertsClient, app: str, harm: Callable[[int], None], dice: random.Random
) -> dict[str, float]:
    """Harm one member at a random moment under load; assert the promises, return the seconds.

    ``failed``: until all its rollouts have ended, typed; ``replaced``: until a new group has
    sampled the same tokens and routes again.
    """
    before = [client.generate(one) for one in _requests("before", 12)]
    records = [_record(client, result) for result in before]
    alive, groups, victims = actors_alive(), placement_groups(), members(app)
    pid = pid_of(dice.choice(victims))
    failed, begun = _under_load(client, lambda: harm(pid), dice)
    for result, record in zip(before, records, strict=True):  # every key still reads
        np.testing.assert_array_equal(_record(client, result).ids, record.ids)
    again = _until_served(client, victims, app)
    replaced = time.monotonic() - begun
    _check_same(client, again, records)
    _until(lambda: actors_alive() == alive and placement_groups() == groups, "nothing is left")
    client.release([str(one.routed_experts) for one in (*before, *again)])
    _until(lambda: client.stats().live_keys == 0, "no lost rollout has left a key")
    return {"failed_s": round(failed, 1), "replaced_s": round(replaced, 1)}


def lose_a_node(
    client: RoutedExpertsClient, app: str, lose: Callable[[], None], again: Callable[[], None]
) -> None:
    """Lose a node of a group under load, and get it ``again``; assert the promises.

    Keys of the node that is gone end with it, and say so; all others read.
    """
    before = [client.generate(one) for one in _requests("before", 12)]
    records = [_record(client, result) for result in before]
    groups, victims = placement_groups(), members(app)
    _under_load(client, lose, random.Random(0))
    read = 0
    for result, record in zip(before, records, strict=True):
        try:
            found = _record(client, result)
        except RoutesLost:  # it lay on that node
            continue
        np.testing.assert_array_equal(found.ids, record.ids)
        read += 1
    assert read > 0
    again()
    _check_same(client, _until_served(client, victims, app), records)
    _until(lambda: placement_groups() == groups, "nothing is left")


def _under_load(
    client: RoutedExpertsClient, harm: Callable[[], None], dice: random.Random
) -> tuple[float, float]:
    """Sample long rollouts and do harm among them; return how long they took to end, and when."""
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(client.generate, one) for one in _requests("long", 1500, 8)]
        first = next(iter(client.stream(_requests("seen", 1500, 1)[0])))
        assert first.output_ids
        time.sleep(dice.random())  # a random moment is what is tested
        begun = time.monotonic()
        harm()
        ends = [future.exception(timeout=REPLACED_S) or future.result() for future in running]
        failed = time.monotonic() - begun
    for end in ends:
        if isinstance(end, GenerateResult):
            assert end.finish_reason == "error", (end.finish_reason, len(end.output_ids))
        else:
            assert isinstance(end, EngineUnavailable), end
    return failed, begun


def _check_same(
    client: RoutedExpertsClient, results: list[GenerateResult], records: list[Record]
) -> None:
    for result, record in zip(results, records, strict=True):
        np.testing.assert_array_equal(_record(client, result).ids, record.ids)


def actors_alive() -> int:
    """Return how many actors there are in the cluster."""
    found = cluster_state.actor_table(None).values()
    return sum(actor["State"] == "ALIVE" for actor in found)


def placement_groups() -> int:
    """Return how many placement groups there are."""
    found = ray.util.placement_group_table().values()
    return sum(group["state"] == "CREATED" for group in found)


def _requests(name: str, new: int, count: int = 4) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=f"{name}-{n}-{time.monotonic_ns()}",
            input_ids=[(7 * n + 11 * place) % 250 + 3 for place in range(20 + n)],
            max_new_tokens=new,
            temperature=0,
            ignore_eos=True,
            return_routed_experts=True,
        )
        for n in range(count)
    ]


def _record(client: RoutedExpertsClient, result: GenerateResult) -> Record:
    assert isinstance(result.routed_experts, str), result.routed_experts_error
    return client.get(result.routed_experts)


def _until_served(
    client: RoutedExpertsClient, victims: list[Any], app: str
) -> list[GenerateResult]:
    ends = time.monotonic() + REPLACED_S
    lost = {victim._actor_id for victim in victims}
    last: Exception | None = None
    while time.monotonic() < ends:
        try:
            if not lost & {member._actor_id for member in members(app)}:
                return [client.generate(one) for one in _requests("again", 12)]
        except Exception as error:  # noqa: BLE001  (whatever a replica that goes away answers)
            last = error
        time.sleep(0.2)
    raise AssertionError(f"not replaced after {REPLACED_S} s: {last}")


def _until(true: Callable[[], bool], what: str) -> None:
    assert eventually(true, 60), f"{what}: {actors_alive()}, {placement_groups()}"
