"""Metrics and events: declared, documented and on the dashboard alike; no whole key in a log."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from serve_app.client.metrics import LABELS, MASKED
from serve_app.deployments.metrics import (
    DECODER,
    ENGINE,
    RANKS,
    STORE,
    DecoderAnswer,
    DecoderMetrics,
    EngineMetrics,
)
from serve_app.errors import RoutesLost
from serve_app.ingress.guard.metrics import INGRESS
from serve_app.observe.instruments import Declared, after_answering
from serve_app.store.owner.metrics import COUNTERS, GAUGES, LATENCY, metric_name
from serve_app.types import GenerateResult
from tests.k8s.dashboard import dashboard_names, queries

DOCS = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
OURS: Declared = {**ENGINE, **RANKS, **DECODER, **STORE, **INGRESS}
SHARDS = {metric_name(field) for field in (*GAUGES, *COUNTERS)} | {LATENCY}


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name, kind and labels of each row of the documentation's tables of metrics."""
    rows = re.findall(r"^\| `(r3serve_\w+)` \| (\w+) \| ([^|]*)\|", DOCS, re.M)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_documentation_names_every_metric_with_its_labels_and_no_other() -> None:
    found = documented()
    assert set(found) == set(OURS) | SHARDS | {MASKED}
    assert found[MASKED] == ("counter", set(LABELS))
    for name, instrument in OURS.items():
        kind = "histogram" if instrument.kind == "seconds" else instrument.kind
        assert found[name] == (kind, set(instrument.labels)), name


def test_the_dashboard_shows_our_metrics_and_names_none_that_is_not_there() -> None:
    exported = {f"ray_{name}" for name in (*OURS, *SHARDS, MASKED)}
    shown = dashboard_names(of_ray=False)
    assert shown - exported == set()
    assert exported - shown == {"ray_r3serve_http_bytes_in_total"}


def test_queries_group_by_labels_that_the_metric_has() -> None:
    of_serve = {"application", "deployment", "replica", "le"}
    of_shards = {"app", "shard", "call", "le"}
    for query in queries():
        for name in re.findall(r"ray_(r3serve_\w+?)(?:_bucket)?[{\[ ]", query):
            if name == MASKED:
                labels = set(LABELS)
            else:
                labels = of_shards if name in SHARDS else of_serve | set(OURS[name].labels)
            used = set(re.findall(r"(\w+)=~", query))
            for group in re.findall(r"by \(([^)]*)\)", query):
                used |= set(re.findall(r"\w+", group))
            assert used <= labels, query


def captured() -> tuple[logging.Handler, list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    return Keep(), records


def test_events_carry_short_keys_and_errors_become_labels() -> None:
    handler, records = captured()
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    key = "AQdyb2xsb3V0" * 6
    try:
        result = GenerateResult("request-1", [1, 2], [0.0, 0.0], "", "stop", 3, 7, key, 4)
        masked = Counter({"RoutesLost": 4})

        async def answer() -> None:
            EngineMetrics().finished(result, 0.5)
            DecoderMetrics().answered(DecoderAnswer(8, 1, masked, 0.1))
            assert not records  # whoever asked has the answer first
            reported = asyncio.Event()
            after_answering(reported.set)
            await asyncio.wait_for(reported.wait(), 30)

        asyncio.run(answer())
        DecoderMetrics().refused(RoutesLost("gone"))
    finally:
        logger.removeHandler(handler)
    told = [record.__dict__["r3serve"] for record in records]
    assert [one["event"] for one in told] == ["rollout", "materialized", "refused"]
    assert told[0]["key"] == "AQdy…b3V0"
    assert told[0]["rollout"] == "request-1"
    assert told[1]["masked_rows"] == 4
    assert told[2]["error"] == "RoutesLost"
    assert not any(key in record.getMessage() for record in records)


def test_outside_of_a_replica_events_are_json_lines_on_stderr() -> None:
    code = (
        "from serve_app.observe.event_log import log_event; "
        "log_event('expired', shard='ab', keys=3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert (line["event"], line["shard"], line["keys"]) == ("expired", "ab", 3)
