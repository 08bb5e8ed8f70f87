"""The demo overlay, really deployed: one raylet a pod group, token auth, a trainer from outside."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.k8s.check import K8S
from tests.k8s.dashboard import dashboard_names
from tests.k8s.kustomize import build
from tests.k8s.ray_process import Deployed, deployed

pytestmark = pytest.mark.cluster

MODEL = "checkpoints/tiny-qwen3-moe"

TRAINER = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
class Trainer:
    def step(self):
        from serve_app import GenerateRequest, RoutedExpertsClient, RoutedSequence
        client = RoutedExpertsClient("rollout")
        results = client.generate_batch([
            GenerateRequest(input_ids=[5, 6, 7 + i], max_new_tokens=8, ignore_eos=True,
                            return_routed_experts=True, tag="step")
            for i in range(4)
        ])
        sequences = [RoutedSequence(r.routed_experts, length=11) for r in results]
        local = client.materialize(sequences, where="local")
        remote = client.materialize(sequences, where="decoder")
        return {
            "shape": list(local.ids.shape),
            "valid": int(local.valid.sum()),
            "same": bool((local.ids == remote.ids).all()),
            "released": client.release(tag="step"),
            "live": client.stats().live_keys,
        }

seen = ray.get(Trainer.remote().step.remote(), timeout=120)
seen["heads"] = [n["NodeID"] for n in ray.nodes() if "CPU" not in n["Resources"]]
seen["nodes"] = len(ray.nodes())
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: Path) -> Iterator[Deployed]:
    with deployed(build(K8S / "overlays" / "cpu-demo"), tiny_checkpoint, MODEL) as running:
        yield running


def test_a_trainer_in_another_process_drives_what_the_manifest_serves(cluster: Deployed) -> None:
    seen = cluster.run_script(TRAINER)
    # 3 prompt and 8 new tokens: 10 rows, and the one after the last is not valid.
    assert seen["shape"] == [44, 4, 4]
    assert seen["valid"] == 40
    assert seen["same"]
    assert (seen["released"], seen["live"]) == (4, 0)
    assert seen["nodes"] == 2
    (head,) = seen["heads"]
    homes = {
        replica["node_id"]
        for deployment in cluster.applications()["rollout"]["deployments"].values()
        for replica in deployment["replicas"]
    }
    assert homes
    assert head not in homes


def test_without_the_token_nobody_gets_in(cluster: Deployed) -> None:
    url = f"{cluster.dashboard}/api/serve/applications/"
    assert requests.get(url, timeout=10).status_code == 401


def test_metrics_are_exported_under_their_documented_names(cluster: Deployed) -> None:
    cluster.run_script(TRAINER)
    busy = {
        "r3serve_store_puts_total",
        "r3serve_store_live_keys",
        "r3serve_engine_rollouts_total",
        "r3serve_engine_rollout_seconds",
        "r3serve_decoder_answers_total",
        "r3serve_http_requests_total",
        "r3serve_store_shards",
    }
    expected = {f"ray_{name}" for name in busy} | dashboard_names(of_ray=True)
    deadline, tick, missing = time.monotonic() + 60, threading.Event(), expected
    while missing and time.monotonic() < deadline:
        tick.wait(1)  # Ray's agents report every few seconds
        text = "".join(requests.get(url, timeout=10).text for url in cluster.metrics)
        exported = set(re.findall(r"^# TYPE (\S+)", text, re.M))
        missing = expected - exported
    assert not missing, sorted(exported)
