"""``shared_store`` in processes without our code, which call it as LMDeploy and xtuner do."""

import os
import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.cluster.conftest import Open

# LMDeploy's put and xtuner's get, in processes that have never heard of serve_app.
FOREIGN = """
import sys
sys.modules["serve_app"] = None
import asyncio, numpy as np, ray
ray.init(address=sys.argv[1], log_to_driver=False)

def puts(array):
    store = ray.get_actor("shared_store", namespace="lmdeploy")
    return ray.get(store.put.remote(array))

async def gets(key):
    store = ray.get_actor("shared_store", namespace="lmdeploy")
    return np.asarray(await store.get.remote(key))

drawn = np.random.default_rng(7).permuted(np.tile(np.arange(128), (600, 48, 1)), axis=-1)
array = drawn[..., :8].astype(np.uint16)
array[:, 0] = 65535
for cut in (600, 3):
    key = puts(array[:cut])
    got = asyncio.run(gets(key))
    assert isinstance(key, str) and got.dtype == np.uint16 and np.array_equal(got, array[:cut])
try:
    asyncio.run(gets("made-up"))
except KeyError as error:
    assert "UnknownKey" in str(error), error
else:
    raise AssertionError("a made-up key was read")
try:
    puts(np.zeros((2, 3), np.uint16))
except ValueError as error:
    assert "[rows, layers, top_k]" in str(error), error
else:
    raise AssertionError("a flat array was put")
ray.get(ray.get_actor("shared_store", namespace="lmdeploy").clear.remote())
print("unchanged")
"""


def test_processes_without_our_code_put_and_get_as_upstream_does(
    open_store: Open, cluster: Cluster, tmp_path: Path
) -> None:
    store, _ = open_store()
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, cluster.address],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "unchanged", done.stdout + done.stderr
    assert store.stats().live_bytes == 0
