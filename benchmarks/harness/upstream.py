"""The paths r3serve is compared with, written from their description (LMDeploy 0.18, xtuner 1.x).

A sample's array is an argument of one named actor, which puts it (1: argument, 2: put) and gives
it away by value, once (3: return value); the rollout worker puts it again (4), and the trainer
makes int64 of it. Older ways carry the array in the HTTP answer: as base64 of a pickle, or as a
JSON list; there the answer's body takes the place of the key.
"""

import asyncio
import base64
import json
import uuid
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle


class SharedStore:
    """LMDeploy's store: one blocking actor for the whole cluster; `get` removes."""

    def __init__(self) -> None:
        self._refs: dict[str, ray.ObjectRef[Any]] = {}

    def put(self, array: Any) -> str:
        key = uuid.uuid4().hex
        self._refs[key] = ray.put(array)
        return key

    def get(self, key: str) -> Any:
        return ray.get(self._refs.pop(key))


class RolloutWorker:
    """xtuner's worker: makes references for the trainer of whatever an engine answered."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._bodies: dict[str, list[str]] = {}

    async def by_key(self, keys: Sequence[str]) -> "list[ray.ObjectRef[Any]]":
        return await asyncio.gather(*map(self._fetch, keys))

    async def _fetch(self, key: str) -> "ray.ObjectRef[Any]":
        return ray.put(np.asarray(await self._store.get.remote(key)))

    async def receive(self, kind: str, keys: Sequence[str], share: int = 1) -> None:
        """Keep the first of ``share`` equal parts of each sample as an answer's body has it."""
        bodies = []
        for key in keys:
            array = await self._store.get.remote(key)
            bodies.append(_ENCODE[kind](array[: max(1, len(array) // share)]))
        self._bodies[kind] = bodies

    async def from_body(self, kind: str) -> "list[ray.ObjectRef[Any]]":
        return [ray.put(np.asarray(_DECODE[kind](body))) for body in self._bodies[kind]]


def _pickled(array: Any) -> bytes:
    pickled: bytes = cloudpickle.dumps(array)  # type: ignore[no-untyped-call]
    return pickled


_ENCODE: dict[str, Callable[[Any], str]] = {
    "base64": lambda array: base64.b64encode(_pickled(array)).decode(),
    "json": lambda array: json.dumps(array.tolist()),
}
_DECODE: dict[str, Callable[[str], Any]] = {
    "base64": lambda body: cloudpickle.loads(base64.b64decode(body)),
    "json": json.loads,
}


def trainer_tensor(refs: "list[ray.ObjectRef[Any]]") -> torch.Tensor:
    """Do as xtuner's trainer: everything int64, one packed tensor."""
    arrays = ray.get(refs)
    layers, top_k = arrays[0].shape[1:]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [torch.as_tensor(array, dtype=torch.long) for array in arrays]
    return torch.cat(tensors).reshape(-1, layers, top_k)
