"""What each format writes comes back as the same record."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import RecordError
from serve_app.records import Record, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FormatName, decode, encode
from tests.distinct_ids import distinct_ids
from tests.unit.wire.samples import MODEL, NAMES, SAY_START, routes, same

SAY_VALID = ("r3serve", "nemo_rl")


@st.composite
def models(draw: st.DrawFn) -> tuple[Record, Expected]:
    layers, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    experts = draw(st.sampled_from([4, 128, 129, 255, 256, 257, 32_768, 32_769, 65_535]))
    moe = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    rows, start = draw(st.integers(1, 9)), draw(st.integers(0, 2**40))
    ids = distinct_ids((rows, layers, top_k), experts, seed=draw(st.integers(0, 99)))
    ids[-1] = experts - 1 - np.arange(top_k)
    record = make_record(ids, num_experts=experts, start=start, moe_layers=moe)
    return record, Expected(layers, top_k, experts, moe, rows, start)


@pytest.mark.parametrize("name", NAMES)
@given(case=models(), say=st.booleans())
def test_every_format_comes_back_as_the_same_record(
    name: FormatName, case: tuple[Record, Expected], say: bool
) -> None:
    record, expected = case
    payload = encode(record, name)
    if name != "array":
        payload = pickle.loads(pickle.dumps(payload))
    same(decode(payload, expected, allow_pickle=True), record)
    same(decode(payload, expected, format=name if say else None, allow_pickle=True), record)


@pytest.mark.parametrize("name", SAY_START)
@given(case=models())
def test_formats_that_say_their_start(name: FormatName, case: tuple[Record, Expected]) -> None:
    record, expected = case
    unknown = Expected(expected.layers, expected.top_k, expected.num_experts, expected.moe_layers)
    same(decode(encode(record, name), unknown), record)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_route_natively_survive_or_are_refused(name: FormatName) -> None:
    valid = np.array([True, False, True, False, True])
    record = routes(5, valid=valid)
    if name not in SAY_VALID:
        with pytest.raises(RecordError, match="row 1 must route natively"):
            encode(record, name)
        return
    found = decode(encode(record, name), MODEL)
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_array_equal(found.ids[valid], record.ids[valid])


@pytest.mark.parametrize("name", NAMES)
def test_moe_layers_alone_go_to_their_global_columns(name: FormatName) -> None:
    record = routes()
    narrow = make_record(record.ids[:, 1:], num_experts=16)
    if name == "r3serve":
        return
    wanted = Expected(3, 2, 16, (1, 2), rows=4)
    same(decode(encode(narrow, name), wanted, allow_pickle=True), record)
