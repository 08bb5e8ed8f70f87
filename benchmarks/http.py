"""HTTP beside handle calls: first tokens, cost per token, and memory over minutes.

    python -m benchmarks.http [--clients 256] [--tokens 32] [--rounds 3] [--minutes 5]
                              [--engines fast,transformers]

Every client streams ``/generate``. Rounds of HTTP and of handle calls take turns in one run, in
one driver. Each stream's tokens are checked: the fast engine continues every prompt in its own
way, and the record of a rollout knows the hash of the tokens it was sampled with. One JSON line
an engine; then one with what each process held while HTTP rounds ran for ``--minutes``.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray import serve

from benchmarks.harness.fast_engine import expected
from benchmarks.harness.http_graph import proxied_ray, served
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.processes import resident_mib
from serve_app.client import RoutedExpertsClient
from serve_app.client.served import ENGINE
from serve_app.records import hash_tokens
from serve_app.types import GenerateRequest

PROMPT_TOKENS = 16


@dataclass(slots=True)
class Stream:
    """One client's rollout."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    took_s: float = 0.0
    key: str | None = None


def prompts(count: int, number: int) -> list[list[int]]:
    """Prompts that no other stream of this run has."""
    return [
        [3 + (number * 7919 + client * 31 + place * place) % 500 for place in range(PROMPT_TOKENS)]
        + [3 + client % 500, 3 + number % 500]
        for client in range(count)
    ]


async def over_http(http: aiohttp.ClientSession, url: str, prompt: list[int], n: int) -> Stream:
    stream, begun = Stream(prompt), time.perf_counter()
    body = {"input_ids": prompt, "max_tokens": n, "ignore_eos": True, "stream": True}
    body |= {"return_routed_experts": True}
    async with http.post(f"{url}/generate", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if not stream.tokens:
                stream.first_s = time.perf_counter() - begun
            stream.tokens += event["output_ids"]
            stream.key = event["meta_info"]["routed_experts"] or stream.key
    stream.took_s = time.perf_counter() - begun
    return stream


async def over_handle(engine: Any, prompt: list[int], n: int) -> Stream:
    stream, begun = Stream(prompt), time.perf_counter()
    request = GenerateRequest(
        input_ids=prompt, max_new_tokens=n, ignore_eos=True, return_routed_experts=True
    )
    async for chunk in engine.options(stream=True).stream.remote(request):
        if not stream.tokens:
            stream.first_s = time.perf_counter() - begun
        stream.tokens += chunk.output_ids
        if chunk.result is not None:
            stream.key = chunk.result.routed_experts
    stream.took_s = time.perf_counter() - begun
    return stream


def check(streams: Sequence[Stream], n: int, client: RoutedExpertsClient, *, fast: bool) -> int:
    """Return how many streams lost or mixed tokens; release their keys."""
    wrong = 0
    for stream in streams:
        good = len(stream.tokens) == n and stream.key is not None
        if good and fast:
            good = stream.tokens == expected(stream.prompt, n)
        if good:
            meta = client.get(str(stream.key)).meta
            good = meta.token_hash == hash_tokens((stream.prompt + stream.tokens)[: meta.rows])
        wrong += not good
    client.release([stream.key for stream in streams if stream.key])
    return wrong


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(rounds: Sequence[Sequence[Stream]], walls: Sequence[float], n: int) -> dict[str, float]:
    streams = [stream for one in rounds for stream in one]
    firsts = [stream.first_s * 1e3 for stream in streams]
    tokens = sum(len(stream.tokens) for stream in streams)
    return {
        "first_token_ms_p50": round(statistics.median(firsts), 1),
        "first_token_ms_p99": round(percentile(firsts, 0.99), 1),
        "tokens_per_s": round(tokens / sum(walls), 1),
        "ms_per_token": round(sum(walls) * 1e3 / tokens, 4),
        "stream_s_p50": round(statistics.median(s.took_s for s in streams), 2),
    }


async def compare(app: str, url: str, args: argparse.Namespace, *, fast: bool) -> dict[str, Any]:
    client = RoutedExpertsClient(app)
    engine = serve.get_deployment_handle(ENGINE, app).options(_by_reference=True)
    found: dict[str, tuple[list[list[Stream]], list[float]]] = {
        "http": ([], []),
        "handle": ([], []),
    }
    wrong, number = 0, 0
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        for round_ in range(-1, args.rounds):  # the first one is for imports and connections
            for way in ("http", "handle") if round_ % 2 else ("handle", "http"):
                number += 1
                asked = prompts(args.clients, number)
                begun = time.perf_counter()
                if way == "http":
                    work = [over_http(http, url, prompt, args.tokens) for prompt in asked]
                else:
                    work = [over_handle(engine, prompt, args.tokens) for prompt in asked]
                streams = await asyncio.gather(*work)
                wall = time.perf_counter() - begun
                wrong += await asyncio.to_thread(check, streams, args.tokens, client, fast=fast)
                if round_ >= 0:
                    found[way][0].append(streams)
                    found[way][1].append(wall)
    ways = {way: summary(*pair, args.tokens) for way, pair in found.items()}
    extra = ways["http"]["ms_per_token"] - ways["handle"]["ms_per_token"]
    return {
        "clients": args.clients,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "streams_with_lost_or_mixed_tokens": wrong,
        **ways,
        "http_adds_ms_per_token": round(extra, 4),
        "http_over_handle": round(ways["http"]["ms_per_token"] / ways["handle"]["ms_per_token"], 2),
        "live_keys_after": client.stats().live_keys,
    }


async def memory(app: str, url: str, args: argparse.Namespace, *, fast: bool) -> dict[str, Any]:
    """Load for minutes; what each process holds is read between rounds, when all is idle."""
    client = RoutedExpertsClient(app)
    samples: list[tuple[float, dict[str, float]]] = []
    wrong, number, begun = 0, 1000, time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        while (now := time.monotonic() - begun) < args.minutes * 60 or len(samples) < 4:
            number += 1
            work = [
                over_http(http, url, prompt, args.tokens)
                for prompt in prompts(args.clients, number)
            ]
            streams = await asyncio.gather(*work)
            wrong += await asyncio.to_thread(check, streams, args.tokens, client, fast=fast)
            samples.append((now, resident_mib()))
    third = max(1, len(samples) // 3)
    middle, last = samples[third : 2 * third], samples[-third:]
    kinds = {}
    for kind in samples[0][1]:
        then, end = (statistics.median(s[kind] for _, s in part) for part in (middle, last))
        kinds[kind] = {
            "first_mib": round(samples[0][1][kind], 1),
            "middle_third_mib": round(then, 1),
            "last_third_mib": round(end, 1),
            "growth": round(end / then - 1, 4) if then else 0.0,
            "series_mib": [
                round(sample[kind]) for _, sample in samples[:: len(samples) // 20 or 1]
            ],
        }
    return {
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "streams": (number - 1000) * args.clients,
        "streams_with_lost_or_mixed_tokens": wrong,
        "anonymous_memory": kinds,
        "flat": all(kind["growth"] <= 0.05 for kind in kinds.values()),
        "live_keys_after": client.stats().live_keys,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--engines", default="fast,transformers")
    args = parser.parse_args()
    with proxied_ray():
        for name in args.engines.split(","):
            fast = name == "fast"
            with served(name, fast=fast) as url:
                if args.rounds:
                    found = asyncio.run(compare(name, url, args, fast=fast))
                    emit({"part": "tokens", "engine": name, **found})
                if args.minutes and fast:
                    held = asyncio.run(memory(name, url, args, fast=fast))
                    emit({"part": "memory", "engine": name, **held})
    emit({"machine": describe(), "versions": versions()})


if __name__ == "__main__":
    main()
