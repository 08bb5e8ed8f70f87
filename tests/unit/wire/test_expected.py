"""What the caller expects: another model's routes are refused, rows are cut when told."""

from typing import Any

import pytest

from serve_app.errors import RecordError
from serve_app.records import make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FormatName, decode, encode
from tests.unit.wire.samples import MODEL, NAMES, SAY_START, routes, same


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Expected(4, 2, 16, (1, 2)), None),
        (Expected(3, 1, 16, (1, 2)), None),
        (Expected(3, 2, 16, (1, 2), rows=5), None),
        (Expected(3, 2, 3, (1, 2)), "3"),
    ],
)
def test_another_model_is_refused(name: FormatName, other: Expected, message: str | None) -> None:
    payload = encode(routes(), name)
    if name in ("array", "nemo_rl") and other.layers == 4:
        # MoE layers alone do not tell how many dense ones there are.
        assert decode(payload, other).meta.layers == 4
        return
    if name in ("sglang", "sglang_tagged") and other.rows is None:
        # Without a shape on the wire, only the number of rows tells another model.
        other = Expected(other.layers, other.top_k, other.num_experts, other.moe_layers, rows=4)
    with pytest.raises(RecordError, match=message):
        decode(payload, other, allow_pickle=True)


@pytest.mark.parametrize("sentinel", [0, 65_535])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_sentinels_are_accepted_in_dense_layers_only(sentinel: int, dtype: str) -> None:
    ids = routes().ids.astype(dtype)
    ids[:, 0] = sentinel
    same(decode(ids, MODEL), routes())
    same(decode(ids.tolist(), MODEL), routes())
    ids[2, 0] = 7
    with pytest.raises(RecordError, match="65535 in dense layer 0, got expert 7 in row 2"):
        decode(ids, MODEL)
    ids[2, 0], ids[3, 1, 1] = sentinel, 65_535
    with pytest.raises(RecordError, match="ids must be in"):
        decode(ids, MODEL)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nemo_rl"])
@pytest.mark.parametrize("rows", [None, 3])
def test_rows_beyond_the_returned_tokens_are_cut_when_told(
    name: FormatName, rows: int | None
) -> None:
    """LMDeploy's key of a stripped stop token has P+G rows, the trainer has P+G-1."""
    record = routes(4)
    payload = encode(record, name)
    told = Expected(3, 2, 16, (1, 2), rows=rows, extra_rows=1)
    if rows is None and name in ("sglang", "sglang_tagged"):
        told = Expected(3, 2, 16, (1, 2), rows=3, extra_rows=1)
    found = decode(payload, told, allow_pickle=True)
    same(found, make_record(record.ids[:3], num_experts=16, moe_layers=(1, 2)))
    with pytest.raises(RecordError):
        decode(payload, Expected(3, 2, 16, (1, 2), rows=3), allow_pickle=True)
    with pytest.raises(RecordError):
        decode(payload, Expected(3, 2, 16, (1, 2), rows=4, extra_rows=1), allow_pickle=True)
    with pytest.raises(RecordError):
        decode(payload, Expected(3, 2, 16, (1, 2), extra_rows=4), allow_pickle=True)


def test_the_start_that_a_payload_says_must_be_the_callers() -> None:
    wrong = Expected(3, 2, 16, (1, 2), start=9)
    for name in SAY_START:
        with pytest.raises(RecordError, match="from position 9 on, got 4"):
            decode(encode(routes(start=4), name), wrong)


@pytest.mark.parametrize(
    "how",
    [
        {"layers": 0},
        {"top_k": 17},
        {"num_experts": 0},
        {"num_experts": 65_536},
        {"extra_rows": -1},
        {"moe_layers": ()},
        {"moe_layers": (2, 1)},
        {"moe_layers": (0, 3)},
        {"moe_layers": (-1, 0)},
    ],
)
def test_no_model_is_like_this(how: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        Expected(**{"layers": 3, "top_k": 2, "num_experts": 16, **how})
