"""A fault run over HTTP: killed replicas, clients that are cut off, garbage, slow readers.

    python -m benchmarks.http_faults [--seconds 60] [--runs 3] [--warm 90] [--seed N]

Every answer must be right, or an error that docs/http.md knows, or a connection that broke while
a process that served it was killed. At the end no key may be left behind once leases are over,
and memory must be back where it was: it is looked at when all is idle, before the first run and
after each. A process that has never met an error, or 4,096 keys, holds less than one that has: so
the same happens for a while before. Prints one JSON line; exits with 1 if something was wrong.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import sys
import time
from collections import Counter
from typing import Any

import aiohttp

from benchmarks.harness.fast_engine import expected
from benchmarks.harness.http_graph import proxied_ray, served
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.processes import kill_replica, resident_mib
from benchmarks.harness.rubbish import rubbish
from serve_app.client import RoutedExpertsClient
from serve_app.records import hash_tokens

APP = "faults"
LEASE_S = 20.0
DOCUMENTED = frozenset({400, 401, 403, 404, 406, 408, 429, 500, 502, 503, 504})
KILL_EVERY_S = 8.0
GARBAGE_KINDS = 1000
_PATHS = (
    "/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/routed_experts/fetch",
    "/routed_experts/materialize",
    "/routed_experts/release",
    "/abort_request",
    "/nowhere",
)


class FaultRun:
    """Everything that happens at once, and what came of it."""

    def __init__(self, url: str, seconds: float, seed: int) -> None:
        self._url = url
        self._rng = random.Random(seed)
        self._client = RoutedExpertsClient(APP)
        self._ends = time.monotonic() + seconds
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._garbage = 0

    @property
    def _on(self) -> bool:
        return time.monotonic() < self._ends

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=90)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            good = [self._good(http, number) for number in range(24)]
            leavers = [self._leaver(http) for _ in range(8)]
            throwers = [self._thrower(http) for _ in range(4)]
            await asyncio.gather(
                *good, *leavers, *throwers, self._sluggish(), asyncio.to_thread(self._killer)
            )

    async def _good(self, http: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while self._on:
            turn += 1
            prompt = [3 + number, 3 + turn % 500, *(self._rng.randrange(3, 500) for _ in "1234")]
            count, stream = self._rng.randint(1, 60), self._rng.random() < 0.6
            body = {"input_ids": prompt, "max_tokens": count, "stream": stream}
            try:
                said = await self._ask(http, {**body, "return_routed_experts": True}, stream)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.seen[f"broken connection {type(error).__name__}"] += 1
                continue
            if isinstance(said, str):
                self.seen[said] += 1
                continue
            await self._judge(prompt, count, *said)

    async def _ask(
        self, http: aiohttp.ClientSession, body: dict[str, Any], stream: bool
    ) -> "str | tuple[list[int], dict[str, Any]]":
        """Return tokens and the last meta_info, or the documented error that came."""
        async with http.post(f"{self._url}/generate", json=body) as answer:
            if answer.status != 200:
                return self._documented(answer.status, await answer.text())
            if not stream:
                whole = await answer.json()
                return whole["output_ids"], whole["meta_info"]
            tokens: list[int] = []
            meta: dict[str, Any] = {}
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return self._documented(event["error"]["code"], str(event))
                    tokens += event["output_ids"]
                    meta = event["meta_info"]
            return tokens, meta

    def _documented(self, status: int, text: str) -> str:
        if status not in DOCUMENTED:
            self.wrong.append(f"status {status}: {text[:300]}")
        return f"error {status}"

    async def _judge(
        self, prompt: list[int], count: int, tokens: list[int], meta: dict[str, Any]
    ) -> None:
        right = expected(prompt, count)
        reason = (meta.get("finish_reason") or {}).get("type")
        key = meta.get("routed_experts")
        if reason is None:  # its ingress was killed half-way
            self.seen["stream without its end"] += 1
            good = tokens == right[: len(tokens)]
        else:
            self.seen[f"finished by {reason}"] += 1
            good = tokens == (right if reason == "length" else right[: len(tokens)])
        if key is not None:
            found = await asyncio.to_thread(self._client.get, key)
            rows = found.meta.rows
            good &= found.meta.token_hash == hash_tokens((prompt + tokens)[:rows])
            await asyncio.to_thread(self._client.release, [key])
        if not good:
            self.wrong.append(f"prompt {prompt}: got {tokens} expected {right}, {meta}")

    async def _leaver(self, http: aiohttp.ClientSession) -> None:
        """Leave in the middle of a stream, or while the whole answer is awaited."""
        while self._on:
            stream = self._rng.random() < 0.5
            body = {"input_ids": [5, 6], "max_tokens": 3000, "stream": stream}
            body |= {"return_routed_experts": True}
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(self._rng.random() * 0.5):
                    async with http.post(f"{self._url}/generate", json=body) as answer:
                        async for _ in answer.content:
                            if self._rng.random() < 0.05:
                                break
            self.seen["left"] += 1

    async def _thrower(self, http: aiohttp.ClientSession) -> None:
        while self._on or self._garbage < GARBAGE_KINDS:
            self._garbage += 1
            path, body = self._rng.choice(_PATHS), rubbish(self._garbage)
            headers = {"content-type": self._rng.choice(["application/json", "text/plain"])}
            try:
                async with http.post(f"{self._url}{path}", data=body, headers=headers) as answer:
                    text = await answer.text()
                    if answer.status == 200:
                        self._free(text)
                    else:
                        self._documented(answer.status, f"{path} {body[:100]!r} {text}")
                    if answer.status == 500 and "internal" in text:
                        self.wrong.append(f"{path} {body[:300]!r}: {text}")
                    self.seen[f"garbage {answer.status}"] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.seen[f"broken connection {type(error).__name__}"] += 1

    def _free(self, text: str) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            key = json.loads(text)["meta_info"]["routed_experts"]
            if key:
                self._client.release([key])

    async def _sluggish(self) -> None:
        """Readers that take a little now and then, and some that take nothing."""
        host, _, port = self._url.removeprefix("http://").partition("/")[0].partition(":")
        body = json.dumps({"input_ids": [5] * 9, "max_tokens": 4000, "stream": True}).encode()
        head = f"POST /{APP}/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sent = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        while self._on:
            sockets = []
            for _ in range(4):
                at = socket.socket()
                at.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                at.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    at.connect((host, int(port)))
                sockets.append(at)
            await asyncio.sleep(0.2)
            for at in sockets:
                with contextlib.suppress(OSError):
                    at.send(sent)
            for _ in range(20):
                await asyncio.sleep(0.3)
                for at in sockets[:2]:
                    with contextlib.suppress(OSError):
                        at.recv(512)
            for at in sockets:
                at.close()
            self.seen["slow readers"] += len(sockets)

    def _killer(self) -> None:
        kinds = ["engine", "ingress"]
        while time.monotonic() + KILL_EVERY_S < self._ends:
            time.sleep(KILL_EVERY_S)
            kind = kinds[self.seen["killed"] % 2]
            if kill_replica(kind, signal.SIGKILL):
                self.seen["killed"] += 1
                self.seen[f"killed {kind}"] += 1


def leases_over(client: RoutedExpertsClient) -> int:
    """Wait until no key is live, as long as leases last; return how many still are."""
    ends = time.monotonic() + LEASE_S + 15
    while (left := client.stats().live_keys) and time.monotonic() < ends:
        time.sleep(0.5)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warm", type=float, default=90, help="seconds before the first look")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seen, wrong, held = Counter[str](), list[str](), list[dict[str, float]]()
    left_at_once, left = list[int](), list[int]()
    with proxied_ray(), served(APP, fast=True, replicas=2, lease_s=LEASE_S, **_two()) as url:
        asyncio.run(FaultRun(url, args.warm, args.seed).run())
        client = RoutedExpertsClient(APP)
        leases_over(client)
        held.append(resident_mib())
        for number in range(args.runs):
            run = FaultRun(url, args.seconds, args.seed + 1 + number)
            asyncio.run(run.run())
            seen += run.seen
            wrong += run.wrong
            left_at_once.append(client.stats().live_keys)
            left.append(leases_over(client))
            held.append(resident_mib())
        ongoing = sum(client._graph.broadcast("ongoing"))
        report = {
            "seconds": args.seconds,
            "runs": args.runs,
            "warm_seconds": args.warm,
            "seed": args.seed,
            "seen": dict(sorted(seen.items())),
            "wrong": len(wrong),
            "keys_left_to_their_lease": left_at_once,
            "keys_left": left,
            "requests_left": ongoing,
            "mib_before_and_after_each": {
                kind: [round(one[kind], 1) for one in held] for kind in held[0]
            },
        }
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    emit(report)
    emit({"machine": describe(), "versions": versions()})
    return 1 if wrong or any(left) or ongoing else 0


def _two() -> dict[str, Any]:
    serve = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.05, "max_ongoing_requests": 768}
    return {"serve": serve}


if __name__ == "__main__":
    sys.exit(main())
