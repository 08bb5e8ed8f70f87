"""Random requests at an engine and its store: do all records have exactly their rows?

    python -m benchmarks.storm [--requests 2000] [--seed 0] [--backend lmdeploy]

Lengths, stops, seeds, aborts, closed streams, groups, resumed rollouts and two weight updates.
Every key is checked as it comes: rows, token hashes, ids in range, the version of each part. At
the end nothing may be left in the store, and requests with a seed, sampled again alone, give the
same tokens. Prints one JSON line; memory is that of the process after each eighth of the requests.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness.lines import emit, only_lines
from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs, StoreArgs
from serve_app.deployments.rollout.engine import InferenceEngine
from serve_app.records import ALL_TRACKS, Record, hash_tokens
from serve_app.store.base import RecordStore
from serve_app.store.owner.memory import shared
from serve_app.types import GenerateChunk, GenerateRequest, GenerateResult, UpdateMode
from serve_app.weights.holder import Packed, pack

AT_ONCE = 40
EXPERTS = 16
KEPT = 50  # rollouts that may be resumed; more would be the storm's own growth
REPLAYED = 10  # requests sampled again alone, of each version

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished rollout that may be resumed: its tokens, and (start, stop, version) of parts."""

    key: str
    tokens: list[int]
    parts: list[tuple[int, int, int]]


class Replica(Protocol):
    """What the storm is sent to: an engine replica, in this process or a served one."""

    def stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]: ...

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    async def generate_group(self, request: GenerateRequest, n: int) -> list[GenerateResult]: ...

    async def abort(self, request_id: str | None = None) -> int: ...

    async def update_weights(self, weights: Packed, version: int, mode: UpdateMode) -> object: ...


@dataclass(slots=True)
class Storm:
    """What goes on, and what was seen so far."""

    engine: Replica
    store: RecordStore
    dice: random.Random
    lengths: Sequence[int] = (1, 2, 9, 40, 200, 700)  # of prompts
    most_new: int = 24
    seen: Counter[str] = field(default_factory=Counter)
    kept: list[Kept] = field(default_factory=list)
    seeded: dict[int, list[tuple[GenerateRequest, list[int]]]] = field(default_factory=dict)

    async def send(self, number: int) -> None:
        """Send one request of a random kind, check what comes back, release it."""
        before = None
        if self.kept and self.dice.random() < 0.25:
            before = self.kept.pop(self.dice.randrange(len(self.kept)))
        request = self._request(number, before)
        fate = self.dice.choices(("finish", "abort", "close", "group"), (12, 3, 2, 2))[0]
        try:
            if fate == "group":
                for result in await self.engine.generate_group(request, self.dice.randint(1, 5)):
                    self._check(request, result, before)
            else:
                await self._stream(request, fate, before)
        finally:
            if before is not None:
                self.store.release([before.key])

    def _request(self, number: int, before: Kept | None) -> GenerateRequest:
        dice = self.dice
        length = dice.choice(self.lengths)
        new = [dice.randrange(3, 250) for _ in range(dice.randint(0, 9) if before else length)]
        return GenerateRequest(
            request_id=f"storm-{number}",
            input_ids=[*before.tokens, *new] if before else new,
            max_new_tokens=dice.randint(1, self.most_new),
            temperature=dice.choice((0.0, 1.0, 1.5)),
            top_k=dice.choice((0, 0, 8)),
            min_p=dice.choice((0.0, 0.0, 0.1)),
            repetition_penalty=dice.choice((1.0, 1.0, 1.2)),
            seed=dice.choice((None, dice.randrange(1 << 40))),
            stop_token_ids=tuple(dice.sample(range(3, 512), dice.choice((0, 40)))),
            stop=("a",) if dice.random() < 0.1 else (),
            include_stop_token=dice.random() < 0.7,
            return_routed_experts=True,
            continue_from=before.key if before else None,
        )

    async def _stream(self, request: GenerateRequest, fate: str, before: Kept | None) -> None:
        after, tokens, abort = self.dice.randint(0, 8), 0, None
        if fate == "abort" and after == 0:
            abort = asyncio.create_task(self.engine.abort(request.request_id))
        async with aclosing(self.engine.stream(request)) as chunks:
            async for chunk in chunks:
                tokens += len(chunk.output_ids)
                if chunk.result is not None:
                    self._check(request, chunk.result, before)
                elif tokens >= after and fate == "close":
                    self.seen["closed"] += 1
                    break
                elif tokens >= after and fate == "abort" and abort is None:
                    abort = asyncio.create_task(self.engine.abort(request.request_id))
        if abort is not None:
            await abort

    def _check(self, request: GenerateRequest, result: GenerateResult, before: Kept | None) -> None:
        self.seen[result.finish_reason] += 1
        tokens = [*request.input_ids, *result.output_ids]
        assert result.error is None, result.error
        if not isinstance(result.routed_experts, str):
            nothing = "aborted before any token was processed"
            single = len(tokens) == 1 and result.routed_experts_error is not None
            assert single or result.routed_experts_error == nothing, result.routed_experts_error
            return
        [chain] = self.store.fetch([result.routed_experts], None, ALL_TRACKS)
        assert isinstance(chain, list), chain
        parts = _check_chain(chain, tokens)
        covered = max(stop for _, stop, _ in parts)
        assert covered == result.num_routed_tokens
        whole = len(tokens) - 1
        earlier = before.parts if before else []
        assert (
            covered == whole
            or result.finish_reason == "abort"
            or (before is not None and covered == max(stop for _, stop, _ in earlier))
        )
        assert parts[: len(earlier)] == earlier
        assert all(version == result.weight_version for _, _, version in parts[len(earlier) :])
        self.seen["resumed" if before else "fresh"] += 1
        if request.seed is not None and result.finish_reason == "length" and not before:
            alone = request.model_copy(update={"request_id": "alone", "continue_from": None})
            if result.request_id == request.request_id:
                known = self.seeded.setdefault(result.weight_version, [])
                if len(known) < REPLAYED:  # what the storm keeps is not what the engine keeps
                    known.append((alone, result.output_ids))
        if len(tokens) < 900 and len(self.kept) < KEPT and self.dice.random() < 0.4:
            self.kept.append(Kept(result.routed_experts, tokens, parts))
        else:
            self.store.release([result.routed_experts])

    async def replay(self, weights: Sequence[Weights]) -> int:
        """Sample seeded requests again, one after the other, on the weights they had."""
        count = 0
        for version, state in enumerate(weights):
            await self.engine.update_weights(pack(state), 100 + version, "drain")
            for request, output in self.seeded.get(version, []):
                result = await self.engine.generate(request)
                assert result.output_ids == output, (version, result.output_ids, output)
                self.store.release([str(result.routed_experts)])
                count += 1
        return count


def _check_chain(chain: Sequence[Record], tokens: list[int]) -> list[tuple[int, int, int]]:
    """Check ids and token hashes of all parts; return each one's (start, stop, version)."""
    for part in chain:
        part.meta.verify(part.ids)
        assert int(part.ids.max()) < EXPERTS
        assert part.meta.token_hash == hash_tokens(tokens[part.start : part.meta.stop])
    assert chain[0].start == 0
    return [(part.start, part.meta.stop, part.weight_version) for part in chain]


def resident_mib() -> float:
    """Return this process's memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def storm(path: Path, requests: int, seed: int, **engine_args: Any) -> dict[str, Any]:
    """Run it in this process and return what was counted; see `blow`."""
    write_checkpoint(path, hidden=32, layers=3, experts=EXPERTS, top_k=2)
    fields = {
        "model": str(path),
        "dtype": "float32",
        "enable_return_routed_experts": True,
        "enable_transfer_obj_ref": True,
        "max_batch_size": 16,
        **engine_args,
    }
    args = EngineArgs.model_validate(fields)
    engine = InferenceEngine(args, StoreArgs(backend="memory"), None)  # type: ignore[arg-type]
    store = shared("local", StoreArgs(backend="memory"))
    return await blow(engine, store, path, requests, seed)


async def blow(
    engine: Replica, store: RecordStore, path: Path, requests: int, seed: int, **sizes: Any
) -> dict[str, Any]:
    """Send everything and return what was counted; raise AssertionError at a wrong record.

    ``path`` is the served checkpoint; it has `EXPERTS` experts. ``sizes``: ``lengths`` and
    ``most_new`` of a `Storm`.
    """
    begun = time.monotonic()
    before = store.stats()  # in a test, other tests may have left something in this process
    run = Storm(engine, store, random.Random(seed), **sizes)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [first, *({name: w * by for name, w in first.items()} for by in (0.8, 1.1))]
    updates: list[tuple[int, UpdateMode]] = [(1, "abort"), (2, "drain")]
    numbers, memory = iter(range(requests)), list[float]()

    async def send_on() -> None:
        for number in numbers:
            if number in (requests // 3, 2 * requests // 3):
                version, mode = updates.pop(0)
                await engine.update_weights(pack(weights[version]), version, mode)
            if number and number % (requests // 8) == 0:
                memory.append(resident_mib())
            await run.send(number)

    async with asyncio.TaskGroup() as senders:
        for _ in range(AT_ONCE):
            senders.create_task(send_on())
    memory.append(resident_mib())
    assert await engine.abort() == 0
    store.release([kept.key for kept in run.kept])
    replayed = await run.replay(weights)
    after = store.stats()
    left_keys = after.live_keys - before.live_keys
    left_bytes = after.live_bytes - before.live_bytes
    assert (left_keys, left_bytes) == (0, 0)
    return {
        "requests": requests,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        **run.seen,
        "replayed_alone": replayed,
        "puts": sum(shard.puts for shard in after.shards),
        "left_keys": left_keys,
        "left_bytes": left_bytes,
        "memory_mib": [round(mib, 1) for mib in memory],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Check random rollouts.")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=["transformers", "lmdeploy"], default="transformers")
    options = parser.parse_args()
    engine_args: dict[str, Any] = {}
    if options.backend == "lmdeploy":
        from benchmarks.harness.lmdeploy_engine import STORMY, without_cuda

        without_cuda()
        engine_args = STORMY
    with tempfile.TemporaryDirectory() as path, only_lines():
        found = asyncio.run(storm(Path(path), options.requests, options.seed, **engine_args))
    emit({"benchmark": "storm", "backend": options.backend, **found})


if __name__ == "__main__":
    main()
