"""Two engine groups side by side on one node, which they have to themselves."""

import asyncio
from pathlib import Path

import numpy as np
from ray.cluster_utils import Cluster

from serve_app.client.served import ServedGraph
from tests.engine_contract import Sampled, mixed_requests, sample
from tests.lmdeploy.conftest import load
from tests.lmdeploy.served.graphs import remove, served
from tests.lmdeploy.served.replicas import places


def test_two_groups_on_one_node_sample_as_a_single_engine(cluster: Cluster, sparse: Path) -> None:
    alone = asyncio.run(_alone(sparse))
    client = served("pair", sparse, replicas=2, dp=2, ep=2)
    both = ServedGraph("pair", None, 60).broadcast("actors")
    found = places([worker for own in both for worker in own[-2:]])
    assert len({node for node, _ in found}) == 1
    assert len({gpu for _, gpu in found}) == 4
    wanted = [*mixed_requests(8), *mixed_requests(8)]
    results = client.generate_batch(wanted)
    for one, done in zip([*alone, *alone], results, strict=True):
        assert (one.ids, one.text) == (done.output_ids, done.text)
        assert one.record is not None
        np.testing.assert_array_equal(one.record.ids, client.get(str(done.routed_experts)).ids)
    remove("pair")


async def _alone(path: Path) -> list[Sampled]:
    engine = load(path)
    try:
        return await asyncio.gather(*(sample(engine, one) for one in mixed_requests(8)))
    finally:
        await engine.stop()
