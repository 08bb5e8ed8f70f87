"""Samples with random routes, put as an engine puts them, and a store to put them in."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from graphs.store import build
from serve_app.client import RoutedExpertsClient
from serve_app.config import StoreGraphArgs

APP = "recipes"


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory: its key, its tokens, and the true routes ``[tokens - 1, layers, top_k]``.

    A trainer has only ``key`` and ``tokens``; ``routes`` is there to check against.
    """

    key: str
    tokens: int
    routes: torch.Tensor


@dataclass(frozen=True, slots=True)
class Model:
    """What a trainer knows of its model."""

    layers: int = 8
    top_k: int = 4
    experts: int = 64
    dense_layers: tuple[int, ...] = (0,)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.layers) if layer not in self.dense_layers)


def put_samples(
    client: RoutedExpertsClient, model: Model, lengths: Sequence[int], tag: str
) -> list[Sample]:
    """Put a sample of each length; every second one in two turns, the second a child of the first.

    P prompt and G returned tokens have P+G-1 rows: the last token was never processed.
    """
    samples = []
    for seed, tokens in enumerate(lengths):
        routes = np.random.default_rng(seed).permuted(
            np.broadcast_to(np.arange(model.experts), (tokens - 1, model.layers, model.experts)),
            axis=-1,
        )[..., : model.top_k]
        routes[:, list(model.dense_layers)] = 0
        how: dict[str, Any] = {"num_experts": model.experts, "moe_layers": model.moe_layers}
        first = tokens // 2 if seed % 2 else tokens - 1
        key = client.put(routes[:first], tag=tag, **how)
        if first < tokens - 1:
            key = client.put(routes[first:], start=first, parent=key, tag=tag, **how)
        samples.append(Sample(key, tokens, torch.from_numpy(routes)))
    return samples


@contextmanager
def served_store() -> Iterator[RoutedExpertsClient]:
    """Serve `graphs.store` on a local Ray of its own; it is gone afterwards."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        serve.run(build(StoreGraphArgs()), name=APP, route_prefix=None)
        yield RoutedExpertsClient(APP)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
