"""FSDP on a Hugging Face model: each data parallel rank replays its own sequences.

Every rank materializes its sequences once and uses them for both passes that replay: the
old-log-probability pass and the training forward. After the optimizer step and a barrier, one
process releases the step's keys.

    python -m examples.recipes.fsdp
"""

import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch names no exports
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from examples.recipes.samples import APP, Model, Sample, put_samples, served_store
from examples.tiny_moe import write_checkpoint
from serve_app.client import RoutedExpertsClient
from serve_app.engines.moe import find_moe_blocks
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.replay import replay_routing
from serve_app.types import RoutedSequence

MODEL = Model(layers=2, top_k=4, experts=16, dense_layers=())
LENGTHS = (24, 17, 20, 11)
RANKS = 2


def sharded(path: Path) -> Any:
    """Return the model, each decoder layer sharded over the ranks, and then the rest."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def step(client: RoutedExpertsClient, model: Any, samples: Sequence[Sample]) -> float:
    """Take one optimizer step on this rank's samples; return the share of routes replayed."""
    batch = client.materialize([RoutedSequence(sample.key, sample.tokens) for sample in samples])
    inputs = torch.cat([torch.arange(sample.tokens) for sample in samples])[None]
    positions = inputs.clone()  # they begin anew with every sequence: attention keeps them apart
    packed = {"input_ids": inputs, "position_ids": positions, "use_cache": False}
    recorder = ExpertRecorder(find_moe_blocks(model))
    with torch.no_grad(), replay_routing(model, batch):
        old = model(**packed).logits.log_softmax(-1)
    with recorder.capture() as captured, replay_routing(model, batch):
        new = model(**packed).logits.log_softmax(-1)
    used = torch.from_numpy(captured.ids())[batch.valid].sort(-1).values
    taken = [sample.routes for sample in samples]
    wanted = torch.cat(taken).sort(-1).values
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ((new - old).exp() * batch.valid[None, :, None]).mean().backward()
    optimizer.step()
    return float((used.long() == wanted).all(-1).double().mean())


class Rank:
    """One data parallel rank; runs as an actor, or in a process of its own."""

    def __init__(self, path: Path, rank: int, ranks: int, port: int) -> None:
        store = TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        self._rank, self._ranks = rank, ranks
        self._model = sharded(path)

    def train(self, client: RoutedExpertsClient | str, samples: Sequence[Sample]) -> float:
        """Train on every ``ranks``-th sample, and meet the others at the barrier."""
        reader = RoutedExpertsClient(client) if isinstance(client, str) else client
        replayed = step(reader, self._model, samples[self._rank :: self._ranks])
        dist.barrier()
        return replayed

    def close(self) -> None:
        dist.destroy_process_group()


def checkpoint(directory: Path) -> Path:
    return write_checkpoint(
        directory, hidden=64, layers=MODEL.layers, experts=MODEL.experts, top_k=MODEL.top_k
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(client: RoutedExpertsClient, path: Path) -> str:
    """Take one step with as many rank actors as there are, and release."""
    samples, port = put_samples(client, MODEL, LENGTHS, tag="step-1"), free_port()
    actor: Any = ray.remote(num_cpus=0)(Rank)
    ranks = [actor.remote(path, rank, RANKS, port) for rank in range(RANKS)]
    replayed = ray.get([rank.train.remote(APP, samples) for rank in ranks], timeout=120)
    released = client.release(tag="step-1")
    return f"replayed on {RANKS} ranks: {replayed}, {released} keys released"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as directory, served_store() as store:
        print(run(store, checkpoint(Path(directory))))
