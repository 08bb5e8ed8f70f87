"""Requests made from the server's own OpenAPI, for as long as asked: no 5xx, nothing undocumented.

    python -m tests.fuzz_http [--seconds 60] [--seed N]

Every operation gets valid and invalid bodies, queries and headers (schemathesis), over a real
socket, before a real engine. Prints one JSON line; exits with 1 if an answer was wrong. 503 is
right from an engine that the fuzzer itself sent to sleep: after each such call it is woken.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode

import tests.conftest  # noqa: F401  # sets the environment before Ray loads
from examples.tiny_moe import write_checkpoint
from tests.distinct_ids import distinct_ids
from tests.http_server import LocalGraph, listening

schemathesis.checks.load_all_checks()
CHECKS = schemathesis.checks.CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)
ALLOWED = frozenset({200, 400, 401, 403, 404, 406, 408, 429, 500, 502, 503, 504})
EXAMPLES = 25


def run(url: str, seconds: float, seed: int, key: str) -> tuple[Counter[str], list[str]]:
    """Return how often each operation gave each status, and what was wrong."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations: list[Any] = [found.ok() for found in _all(schema)]
    ends, rng = time.monotonic() + seconds, random.Random(seed)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    while time.monotonic() < ends:
        operation = rng.choice(operations)
        mode = rng.choice(list(GenerationMode))
        for case in _cases(operation, mode, rng.randrange(2**32), ends):
            _use(case, key, rng)
            try:
                answer = case.call(base_url=url)
            except requests.RequestException as failure:
                wrong.append(f"{case.as_curl_command()}: {failure}"[:2000])
                continue
            seen[f"{operation.method.upper()} {operation.path} {answer.status_code}"] += 1
            try:
                case.validate_response(answer, checks=CHECKS)
                assert answer.status_code in ALLOWED, answer.status_code
            except (AssertionError, BaseExceptionGroup) as failure:
                wrong.append(f"{case.as_curl_command()}: {answer.status_code}: {failure}"[:2000])
            if operation.path in ("/sleep", "/wakeup"):
                requests.post(f"{url}/wakeup", timeout=30).raise_for_status()
    return seen, wrong


def _all(schema: Any) -> Iterator[Any]:
    yield from schema.get_all_operations()


def _cases(operation: Any, mode: GenerationMode, seed: int, ends: float) -> Iterator[Any]:
    found: list[Any] = []
    quiet = list(HealthCheck)

    @seeded(seed)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=quiet,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        if time.monotonic() < ends:
            found.append(case)

    try:
        collect()
    except Exception as unsatisfiable:  # e.g. nothing about /health can be wrong
        if "nsatisf" not in f"{type(unsatisfiable).__name__}{unsatisfiable}":
            raise
    yield from found


def _use(case: Any, key: str, rng: random.Random) -> None:
    """Now and then say what only this server knows: a real key, its model, small limits."""
    body = case.body
    if not isinstance(body, dict):
        return
    if "model" in body and rng.random() < 0.7:
        body["model"] = "tiny"
    if "key" in body and rng.random() < 0.5:
        body["key"] = key
    if isinstance(sequences := body.get("sequences"), list):  # it may be anything
        for sequence in sequences:
            if isinstance(sequence, dict) and rng.random() < 0.5:
                sequence["key"] = key
    if "master_port" in body:
        body["world_size"] = 2 - rng.randint(0, 1)  # too small, or it waits for a trainer
        body["rank_offset"] = 2
    if "input_ids" in body and rng.random() < 0.5:
        body["input_ids"] = [rng.randrange(512) for _ in range(rng.randint(1, 8))]
        if rng.random() < 0.7:
            body.pop("prompt", None)
            body["messages"] = []
    if case.operation.path in ("/generate", "/v1/chat/completions", "/v1/completions"):
        body["max_tokens"] = rng.randint(1, 4) if rng.random() < 0.9 else body.get("max_tokens")
        body.pop("max_completion_tokens", None)
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 3)


def fuzz(model: Path, seconds: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Serve a small model and fuzz it; return a report and what was wrong."""
    graph = LocalGraph(model, enable_return_routed_experts=True, enable_transfer_obj_ref=True)
    key = graph.client.put(distinct_ids((40, 4, 4), 16), num_experts=16)
    edge = graph.edge(
        model_name="tiny", access_log=False, max_body_bytes=1 << 16, control_timeout_s=5
    )
    begun = time.monotonic()
    with listening(edge) as url:
        seen, wrong = run(url, seconds, seed, key)
        requests.post(f"{url}/wakeup", timeout=30).raise_for_status()
        assert requests.get(f"{url}/health", timeout=30).json()["status"] == "healthy"
    statuses: Counter[str] = Counter()
    for name, count in seen.items():
        statuses[name.rpartition(" ")[2]] += count
    report = {
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seed,
        "requests": sum(seen.values()),
        "operations": len({name.rpartition(" ")[0] for name in seen}),
        "statuses": dict(sorted(statuses.items())),
        "wrong": len(wrong),
    }
    return report, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(
            Path(folder), hidden=64, experts=16, dense_layers=(1,), context=512
        )
        report, wrong = fuzz(model, args.seconds, args.seed)
    for one in wrong[:20]:
        print(one, file=sys.stderr)
    print(json.dumps(report))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
