"""Which decoder replica a call goes to; tests/cluster/placement/test_decoders.py has real ones."""

import asyncio
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest  # type: ignore[attr-defined]

from serve_app.config import DecoderArgs
from serve_app.deployments.routing.placement import NearBytesRouter, near_bytes

HERE, THERE = "0011223344", "5566778899"
REPLICAS: list[Any] = [
    SimpleNamespace(replica_id=number, node_id=node)
    for number, node in enumerate((HERE + "ff", THERE + "ff", THERE + "ff", None, HERE + "ff"))
]


def router(clock: Any) -> NearBytesRouter:
    made = NearBytesRouter(
        DeploymentID("ExpertDecoder", "unit"), DeploymentHandleSource.UNKNOWN, get_curr_time_s=clock
    )
    config = near_bytes(DecoderArgs(near_wait_s=3))
    made.initialize_state(**config.request_router_kwargs)
    return made


def call(number: int = 0, **kwargs: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id=f"r{number}", internal_request_id=f"i{number}")
    return PendingRequest([], kwargs, metadata, created_at=100.0)


def numbers(ranks: list[list[Any]]) -> list[list[int]]:
    return [sorted(replica.replica_id for replica in rank) for rank in ranks]


async def test_a_call_waits_for_a_replica_beside_its_bytes_and_then_takes_any() -> None:
    now = [102.0]
    routes = router(lambda: now[0])
    near = call(near=HERE)
    assert numbers(await routes.choose_replicas(REPLICAS, near)) == [[0, 4]]
    assert near.routing_context.should_backoff
    now[0] = 103.5
    beside, anywhere = numbers(await routes.choose_replicas(REPLICAS, near))
    assert beside == [0, 4]
    assert len(anywhere) == 2


async def test_a_call_without_a_place_or_a_replica_there_takes_the_less_busy_of_two() -> None:
    routes = router(lambda: 100.0)
    for pending in (None, call(), call(near=""), call(near="ffffffffff")):
        (anywhere,) = numbers(await routes.choose_replicas(REPLICAS, pending))
        assert len(set(anywhere)) == 2
    assert numbers(await routes.choose_replicas(REPLICAS[:1], call(near=THERE))) == [[0]]


async def test_no_call_is_forgotten_by_the_task_that_took_it() -> None:
    routes = router(lambda: 100.0)
    first, second = call(1), call(2)
    for pending in (first, second):
        routes._pending_requests_to_fulfill.append(pending)
        routes._pending_requests_to_route.append(pending)
    taken = [routes._get_next_pending_request_to_route() for _ in range(3)]
    assert taken == [first, second, first]
    first.future.set_result(REPLICAS[0])
    assert routes._get_next_pending_request_to_route() is second
    second.future.cancel()
    await asyncio.sleep(0)
    assert routes._get_next_pending_request_to_route() is None
