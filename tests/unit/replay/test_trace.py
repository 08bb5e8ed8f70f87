"""Proof of replay: what was recorded, what came and what routers used, line by line."""

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engines.moe import find_moe_blocks
from serve_app.errors import ReplayError
from serve_app.records import Record, make_record
from serve_app.replay import Trace, check_trace, replay_routing
from serve_app.replay.verdict import FORMAT
from serve_app.types import BatchSpec, ExpertBatch, RankSlice, RoutedSequence
from tests.families import tiny
from tests.unit.replay.passes import TOKENS, checkpoint_layers, loss_of, random_tokens
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = torch.cat([torch.arange(10), torch.arange(14)])[None]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def two_sequences(model: Any, **changes: Any) -> ExpertBatch:
    cu_seqlens = torch.tensor([0, 10, TOKENS], dtype=torch.int32)
    return batch_of(model, random_ids(model), cu_seqlens=cu_seqlens, **changes)


def traced(model: Any, batch: ExpertBatch, trace: Trace, *, backward: bool = False) -> None:
    with replay_routing(model, batch, trace=trace):
        logits = model(random_tokens(), position_ids=POSITIONS, use_cache=False).logits
        if backward:
            loss_of(logits).backward()


@pytest.fixture
def model() -> Any:
    return tiny("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])


def test_a_line_a_row_and_layer_of_the_chosen_sequences(model: Any, tmp_path: Path) -> None:
    valid = torch.ones(TOKENS, dtype=torch.bool)
    valid[-1] = False
    batch = two_sequences(model, valid=valid)
    trace = Trace(tmp_path / "trace.jsonl", [1])
    traced(model, batch, trace)
    header, begin, *lines, end = lines_of(trace.path)
    assert header == FORMAT
    assert begin == {"pass": 1, "rows": 14, "layers": [0, 2]}
    assert end == {"lines": 28, "error": None}
    assert [(line["layer"], line["row"]) for line in lines] == [
        (layer, row) for layer in (0, 2) for row in range(10, TOKENS)
    ]
    for line in lines:
        came = batch.ids[line["row"], [0, 2].index(line["layer"])].tolist()
        assert (line["sequence"], line["sliced"], line["recorded"]) == (1, came, None)
        assert line["valid"] == (line["row"] < TOKENS - 1)
        assert line["weight_version"] == -1
        assert line["used"] == came or not line["valid"]
    assert stat.S_IMODE(trace.path.stat().st_mode) == 0o600
    verdict = trace.verdict()
    assert verdict.happened
    assert verdict.says == (
        "replay happened: 13 rows replayed, 1 routed natively, 0 mismatches; forward passes: 1;"
        " no records beside them"
    )


def record_of(batch: ExpertBatch, rows: slice, start: int) -> Record:
    ids = np.zeros((rows.stop - rows.start, 3, 2), dtype=np.uint8)
    ids[:, [0, 2]] = batch.ids[rows].numpy()
    return make_record(ids, num_experts=8, start=start, moe_layers=[0, 2])


def test_records_stand_beside_what_the_batch_has_of_them(model: Any, tmp_path: Path) -> None:
    batch = two_sequences(model)
    records = {"a": record_of(batch, slice(0, 9), 0), "b": record_of(batch, slice(10, TOKENS), 5)}
    of = [RoutedSequence("a", 10), RoutedSequence("b", 14, first=5)]
    trace = Trace(tmp_path / "trace.jsonl", of=of, get=records.__getitem__)
    traced(model, batch, trace)
    lines = [line for line in lines_of(trace.path) if "used" in line]
    for line in lines:
        assert line["recorded"] == (None if line["row"] == 9 else line["sliced"])
    assert "compared with their records" in trace.verdict().says


def _another_record(model: Any, batch: ExpertBatch, records: dict[str, Record]) -> None:
    other = replace(batch, ids=batch.ids.clone())
    other.ids[3, 1] = (batch.ids[3, 1] + 1) % 8
    records["a"] = record_of(other, slice(0, 10), 0)


def _a_router_of_its_own(model: Any, batch: ExpertBatch, records: dict[str, Record]) -> None:
    def hook(_: Any, args: Any) -> Any:
        hidden, ids, weights = args
        changed = ids.clone()
        changed[12] = (ids[12] + 1) % 8
        return hidden, changed, weights

    find_moe_blocks(model)[1].experts.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (_another_record, r"pass 1, sequence 0, row 3, layer 2: recorded \[.*\], the batch has"),
        (_a_router_of_its_own, r"pass 1, sequence 1, row 12, layer 2: the batch has .*router used"),
    ],
)
def test_the_first_place_that_differs_is_named(
    model: Any,
    tmp_path: Path,
    change: Callable[[Any, ExpertBatch, dict[str, Record]], None],
    where: str,
) -> None:
    batch = two_sequences(model)
    batch.ids[3, 1] = torch.tensor([1, 2])
    batch.ids[12, 1] = torch.tensor([1, 2])
    records = {"a": record_of(batch, slice(0, 10), 0), "b": record_of(batch, slice(10, TOKENS), 0)}
    change(model, batch, records)
    of = [RoutedSequence("a", 10), RoutedSequence("b", 14)]
    trace = Trace(tmp_path / "trace.jsonl", of=of, get=records.__getitem__)
    traced(model, batch, trace)
    verdict = trace.verdict()
    assert (verdict.happened, verdict.mismatches, verdict.replayed) == (False, 1, TOKENS - 1)
    with pytest.raises(AssertionError, match=where):
        raise AssertionError(verdict.says)


def test_another_order_of_the_same_experts_is_the_same(model: Any, tmp_path: Path) -> None:
    batch = two_sequences(model)
    turned = replace(batch, ids=batch.ids.flip(-1))
    records = {"a": record_of(turned, slice(0, 10), 0)}
    of = [RoutedSequence("a", 10), RoutedSequence("b", 14)]
    trace = Trace(tmp_path / "trace.jsonl", [0], of=of, get=records.__getitem__)
    traced(model, batch, trace)
    assert trace.verdict().happened


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_runs_again_in_backward_is_not_written(
    model: Any, tmp_path: Path, use_reentrant: bool
) -> None:
    checkpoint_layers(model, use_reentrant=use_reentrant)
    trace = Trace(tmp_path / "trace.jsonl")
    for _ in range(2):
        traced(model, two_sequences(model), trace, backward=True)
    assert len(lines_of(trace.path)) == 1 + 2 * (2 + 2 * TOKENS)
    verdict = trace.verdict()
    assert (verdict.passes, verdict.replayed, verdict.happened) == (2, 2 * TOKENS, True)


def test_a_ranks_rows_are_told_whose_they_are(tmp_path: Path) -> None:
    """Zigzag over two ranks: the first has the first and the last quarter of each sequence."""
    model = tiny("qwen3_moe")
    whole = random_ids(model, 16)
    rows = [0, 1, 6, 7, 8, 9, 14, 15]
    batch = batch_of(model, whole[rows], cu_seqlens=torch.tensor([0, 8, 16]), columns=(0, 1, 2))
    of = [RoutedSequence("a", 8), RoutedSequence("b", 7)]
    spec = BatchSpec(rank=RankSlice(seq_multiple=4, cp_size=2))
    records = {
        key: make_record(ids.numpy(), num_experts=8)
        for key, ids in (("a", whole[:8]), ("b", whole[8:15]))
    }
    trace = Trace(tmp_path / "trace.jsonl", [1], of=of, get=records.__getitem__, spec=spec)
    with replay_routing(model, batch, trace=trace):
        model(random_tokens(8), use_cache=False)
    lines = [line for line in lines_of(trace.path) if "used" in line]
    assert [line["row"] for line in lines if line["layer"] == 2] == [4, 5, 6]  # 15 is padding
    assert trace.verdict().happened
    assert trace.verdict().recorded == len(lines)
    message = r"the batch has 8 of 16 rows: expected of= and spec="
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, batch, trace=Trace(tmp_path / "other.jsonl")),
    ):
        pass


def test_versions_of_the_weights_stand_beside_the_rows(model: Any, tmp_path: Path) -> None:
    version_of = (torch.arange(TOKENS) >= 10).long()
    batch = two_sequences(model, versions=(5, 9), version_of=version_of)
    trace = Trace(tmp_path / "trace.jsonl")
    traced(model, batch, trace)
    lines = [line for line in lines_of(trace.path) if "used" in line]
    assert all(line["weight_version"] == (5, 9)[line["sequence"]] for line in lines)


def test_without_routes_there_was_no_replay(model: Any, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.jsonl")
    traced(model, two_sequences(model, valid=torch.zeros(TOKENS, dtype=torch.bool)), trace)
    verdict = trace.verdict()
    assert (verdict.happened, verdict.native) == (False, TOKENS)
    assert "no row had routes" in verdict.says


def test_a_forward_pass_that_failed_is_no_proof(model: Any, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.jsonl")
    with pytest.raises(KeyError), replay_routing(model, two_sequences(model), trace=trace):
        raise KeyError("loss")
    with pytest.raises(ReplayError, match="line 3: the forward pass failed with KeyError: 'loss'"):
        trace.verdict()


def test_nobodys_file_is_overwritten(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("mine")
    trace = Trace(path)
    for _ in range(2):
        with (
            pytest.raises(ReplayError, match=r"expected a new file, got .*File exists"),
            replay_routing(model, two_sequences(model), trace=trace),
        ):
            pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize("sequences", [[2], [-1]])
def test_sequences_that_are_not_there_are_refused(
    model: Any, tmp_path: Path, sequences: list[int]
) -> None:
    trace = Trace(tmp_path / "trace.jsonl", sequences)
    with (
        pytest.raises(ReplayError, match=r"expected sequences in \[0, 2\)"),
        replay_routing(model, two_sequences(model), trace=trace),
    ):
        pass
    assert not trace.path.exists()


def test_records_need_the_sequences_that_they_are_of(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="expected the sequences that were materialized"):
        Trace(tmp_path / "trace.jsonl", get=dict[str, Record]().__getitem__)


WHOLE = [
    json.dumps(line)
    for line in (
        FORMAT,
        {"pass": 1, "rows": 1, "layers": [0]},
        {
            "sequence": 0,
            "row": 0,
            "layer": 0,
            "valid": True,
            "recorded": [1, 2],
            "sliced": [2, 1],
            "used": [1, 2],
        },
        {"lines": 1, "error": None},
    )
]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no trace: .* found nothing"),
        ("[1]\n", r"is no trace: .* found '\[1\]"),
        ("not json\n", "is no trace: .* found 'not json"),
        ('{"a": 1}\n', "is no trace: .* in line 1"),
        ("\n".join(WHOLE[:3]) + "\n", "is cut off: expected 1 lines .* found 1"),
        ("\n".join(WHOLE[:2]) + "\n", "is cut off: expected 1 lines .* found 0"),
        ("\n".join(WHOLE[:3])[:-9], "is cut off in line 3"),
        ("\n".join([*WHOLE[:2], WHOLE[3]]) + "\n", "line 3: expected 1 lines of the pass, found 0"),
        ("\n".join([WHOLE[0], WHOLE[2]]) + "\n", "is no trace: .* in line 2"),
        ("\n".join([*WHOLE[:2], '{"used": [1]}']) + "\n", "is no trace: .* in line 3"),
    ],
)
def test_what_is_no_whole_trace_is_one_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ReplayError, match=message):
        check_trace(path)


def test_a_trace_of_other_bytes_or_nowhere_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with pytest.raises(ReplayError, match="No such file"):
        check_trace(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ReplayError, match="decode"):
        check_trace(path)
    path.write_text("\n".join(WHOLE) + "\n")
    assert check_trace(path).happened
