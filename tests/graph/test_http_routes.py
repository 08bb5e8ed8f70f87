"""Routes over HTTP: fetch, materialize, release, and the command that fetches."""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load
from typer.testing import CliRunner

from serve_app import RoutedSequence
from serve_app.cli import main
from serve_app.client.over_http import RoutesFetcher
from serve_app.errors import KeyReleased, StoreError, UnknownKey
from serve_app.wire.formats.ours import from_bytes
from tests.distinct_ids import distinct_ids
from tests.http_server import LocalGraph, client_of, listening

OURS, NPY = "application/vnd.r3serve.record", "application/x-npy"
SAFETENSORS = "application/vnd.safetensors"


@pytest.fixture
def key(graph: LocalGraph) -> Iterator[str]:
    """A key of 50 rows."""
    tokens = list(range(50))
    made = graph.client.put(
        distinct_ids((50, 4, 4), 16), num_experts=16, moe_layers=(0, 2, 3), tokens=tokens
    )
    yield made
    graph.client.release([made])


def fetch(http: httpx.Client, kind: str | None, **body: Any) -> httpx.Response:
    headers = {} if kind is None else {"accept": kind}
    return http.post("/routed_experts/fetch", json=body, headers=headers)


def test_a_key_comes_in_every_form(http: httpx.Client, graph: LocalGraph, key: str) -> None:
    record = graph.client.get(key)
    ours = fetch(http, None, key=key)
    assert ours.headers["content-type"] == OURS
    assert from_bytes(ours.content).meta == record.meta
    npy = np.load(io.BytesIO(fetch(http, NPY, key=key).content))
    np.testing.assert_array_equal(npy, record.ids)
    named = load(fetch(http, f"{SAFETENSORS};q=0.9, text/html", key=key).content)
    np.testing.assert_array_equal(named["ids"], record.ids)
    assert named["valid"].all()
    assert fetch(http, "text/html", key=key).status_code == 406


def test_rows_can_be_asked_for(http: httpx.Client, graph: LocalGraph, key: str) -> None:
    record = graph.client.get(key)
    part = fetch(http, OURS, key=key, first=10, rows=5)
    found = from_bytes(part.content)
    assert (found.start, found.meta.rows) == (10, 5)
    np.testing.assert_array_equal(found.ids, record.ids[10:15])
    assert part.headers["x-r3serve-stop"] == "50"
    beyond = fetch(http, OURS, key=key, first=48, rows=5)
    assert (beyond.status_code, beyond.json()["code"]) == (400, 400)
    assert "[48, 53)" in beyond.json()["message"]


def test_why_a_key_cannot_be_read_has_its_name(http: httpx.Client, graph: LocalGraph) -> None:
    key = graph.client.put(np.zeros((2, 1, 1), np.uint8), num_experts=1)
    assert http.post("/routed_experts/release", json={"keys": [key]}).json() == {"released": 1}
    assert http.post("/routed_experts/release", json={"keys": [key]}).json() == {"released": 0}
    gone = fetch(http, None, key=key)
    assert (gone.status_code, gone.json()["type"]) == (404, "KeyReleased")
    assert key not in gone.text
    made_up = fetch(http, None, key="x" * 40)
    assert (made_up.status_code, made_up.json()["type"]) == (404, "UnknownKey")


def test_tags_are_released_with_an_admin_key_only(graph: LocalGraph) -> None:
    graph.client.put(np.zeros((2, 1, 1), np.uint8), num_experts=1, tag="step-1")
    edge = graph.edge(api_keys=["one"], admin_keys=["boss"], access_log=False)
    with client_of(edge) as http:
        for key, status in (("one", 403), ("boss", 200)):
            headers = {"authorization": f"Bearer {key}"}
            body = {"tag": "step-1"}
            answer = http.post("/routed_experts/release", json=body, headers=headers)
            assert answer.status_code == status
    assert answer.json() == {"released": 1}


def test_materialized_over_http_is_what_a_client_gets(
    http: httpx.Client, graph: LocalGraph, key: str
) -> None:
    rank = {"cp_size": 2, "cp_rank": 1, "seq_multiple": 4, "layers": [3, 0]}
    body = {"sequences": [{"key": key, "length": 51}], "dtype": "int32", "rank": rank}
    answer = http.post("/routed_experts/materialize", json=body)
    assert answer.status_code == 200, answer.text
    named = load(answer.content)
    from serve_app import RankSlice

    slice_ = RankSlice(cp_size=2, cp_rank=1, seq_multiple=4, layers=(3, 0))
    batch = graph.client.materialize([RoutedSequence(key, 51)], dtype="int32", rank=slice_)
    np.testing.assert_array_equal(named["ids"], batch.ids.numpy())
    np.testing.assert_array_equal(named["valid"], batch.valid.numpy())
    np.testing.assert_array_equal(named["cu_seqlens"], batch.cu_seqlens.numpy())


def test_a_batch_says_what_is_missing(http: httpx.Client, key: str, tmp_path: Path) -> None:
    body: dict[str, Any] = {"sequences": [{"key": key, "length": 60}]}
    gap = http.post("/routed_experts/materialize", json=body)
    assert (gap.status_code, gap.json()["type"]) == (400, "RoutesGap")
    body["on_missing"] = "mask"
    masked = http.post("/routed_experts/materialize", json=body)
    (tmp_path / "batch").write_bytes(masked.content)
    with safe_open(tmp_path / "batch", framework="numpy") as batch:
        assert batch.metadata()["missing"] == '[[0, 50, 10, "RoutesGap"]]'
        assert batch.get_tensor("valid").sum() == 50
    only_ids = http.post("/routed_experts/materialize", json=body, headers={"accept": NPY})
    assert only_ids.status_code == 406
    body["sequences"][0]["length"] = 50
    whole = http.post("/routed_experts/materialize", json=body, headers={"accept": NPY})
    assert np.load(io.BytesIO(whole.content)).shape == (50, 4, 4)


def test_rows_that_are_masked_over_http_are_counted_too(
    http: httpx.Client, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counter[str]()

    class Counting:
        def __init__(self, *_: Any) -> None: ...

        def inc(self, rows: float, labels: dict[str, str]) -> None:
            assert labels["app"]
            counted[labels["reason"]] += int(rows)

    monkeypatch.setattr("serve_app.client.metrics.Counter", Counting)
    connected = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setattr("serve_app.client.metrics.ray", connected)
    sequences = [{"key": key, "length": 53}, {"key": None, "length": 7}]
    body = {"sequences": sequences, "on_missing": "mask"}
    answer = http.post("/routed_experts/materialize", json=body)
    assert load(answer.content)["valid"].sum() == 50
    assert counted == {"RoutesGap": 3, "NoRoutes": 7}


def test_a_batch_without_any_routes_has_the_served_models_shape(http: httpx.Client) -> None:
    body = {"sequences": [{"key": None, "length": 7}], "on_missing": "mask"}
    found = load(http.post("/routed_experts/materialize", json=body).content)
    assert found["ids"].shape == (7, 4, 4)
    assert not found["valid"].any()


def test_answers_are_bounded(graph: LocalGraph, key: str) -> None:
    with client_of(graph.edge(max_answer_bytes=200, access_log=False)) as http:
        assert fetch(http, NPY, key=key).status_code == 400
        assert fetch(http, NPY, key=key, rows=12).status_code == 200
        for length in (20, 10**9):
            body = {"sequences": [{"key": key, "length": length}], "on_missing": "mask"}
            answer = http.post("/routed_experts/materialize", json=body)
            assert (answer.status_code, "at most 200 bytes" in answer.text) == (400, True)


@pytest.mark.parametrize("name", ["routes.r3", "routes.npy", "routes.safetensors"])
def test_the_command_writes_a_file(
    graph: LocalGraph, url: str, key: str, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    done = CliRunner().invoke(main, ["fetch", "-", "-o", str(file), "--url", url], input=key)
    assert done.exit_code == 0, done.output
    assert "50 rows" in done.output
    data = file.read_bytes()
    ids = graph.client.get(key).ids
    if name.endswith("r3"):
        np.testing.assert_array_equal(from_bytes(data).ids, ids)
    elif name.endswith("npy"):
        np.testing.assert_array_equal(np.load(file), ids)
    else:
        np.testing.assert_array_equal(load(data)["ids"], ids)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_array_larger_than_an_answer_comes_in_pieces(
    graph: LocalGraph, key: str, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    (tmp_path / "key").write_text("one\n")
    with listening(graph.edge(max_answer_bytes=320, api_keys=["one"], access_log=False)) as at:
        fetcher = RoutesFetcher(at, "one")
        out = tmp_path / "ids.npy"
        count = fetcher.fetch(key, out, "npy", first=5, progress=lambda *at: steps.append(at))
        assert count == 45
        np.testing.assert_array_equal(np.load(out), graph.client.get(key).ids[5:])
        assert steps == [(20, 45), (40, 45), (45, 45)]
        with pytest.raises(StoreError, match="at most 320 bytes"):
            fetcher.fetch(key, tmp_path / "whole", "record")
        with pytest.raises(StoreError, match="401"):
            RoutesFetcher(at, "two").fetch(key, tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "key"]


def test_fetching_raises_what_reading_would(url: str, graph: LocalGraph, tmp_path: Path) -> None:
    fetcher = RoutesFetcher(url)
    with pytest.raises(UnknownKey):
        fetcher.fetch("nonsense", tmp_path / "x")
    key = graph.client.put(np.zeros((2, 1, 1), np.uint8), num_experts=1)
    graph.client.release([key])
    with pytest.raises(KeyReleased):
        fetcher.fetch(key, tmp_path / "x")
    failed = CliRunner().invoke(main, ["fetch", key, "-o", str(tmp_path / "x"), "--url", url])
    assert failed.exit_code == 1
    assert not (tmp_path / "x").exists()
