"""What `make release` runs on an installed wheel: the store graph served, a record put and read.

python -I tests/installed.py        (-I: nothing from the working directory)
"""

import logging
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import ray
from ray import serve

import graphs
import serve_app
from graphs.store import build
from serve_app import RoutedExpertsClient, RoutedSequence
from serve_app.config import StoreGraphArgs


def main() -> None:
    tree = Path(__file__).parents[1]
    for package in (serve_app, graphs):
        assert package.__file__ is not None
        assert "site-packages" in package.__file__, f"{package.__file__} is of {tree}"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        serve.start(proxy_location="Disabled")
        serve.run(build(StoreGraphArgs()), name="rollout", route_prefix=None)
        client = RoutedExpertsClient("rollout")
        experts = np.tile(np.arange(128), (300, 48, 1))
        ids = np.random.default_rng(0).permuted(experts, axis=-1)[..., :8]
        key = client.put(ids, num_experts=128)
        for where in ("local", "decoder"):
            batch = client.materialize([RoutedSequence(key, 300)], where=where)
            np.testing.assert_array_equal(batch.ids.numpy(), ids)
        assert client.release([key]) == 1
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    print(f"r3serve {version('r3serve')} with ray {ray.__version__} works as installed")


if __name__ == "__main__":
    main()
