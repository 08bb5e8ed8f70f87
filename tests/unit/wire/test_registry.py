"""The registry of formats: which one a payload is, and what none of them can write."""

import pytest

from serve_app.errors import RecordError
from serve_app.records import raw_record
from serve_app.wire.registry import decode, encode
from tests.unit.wire.samples import IDS, MODEL, NAMES, routes


def test_a_format_out_of_nowhere_and_two_at_once() -> None:
    with pytest.raises(RecordError, match=r"a format out of r3serve.*got 'csv'"):
        decode("AAAA", MODEL, format="csv")  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=r"a format out of r3serve.*got 'csv'"):
        encode(routes(), "csv")  # type: ignore[arg-type]
    both = {"data": "", "shape": [1, 3, 2], "dtype": "uint8", "routed_experts": ""}
    with pytest.raises(RecordError, match="like sglang_tagged and skyrl: say which"):
        decode(both, MODEL)


def test_an_array_whose_experts_nobody_named_is_not_encoded() -> None:
    for name in NAMES:
        with pytest.raises(RecordError, match="known experts"):
            encode(raw_record(IDS), name)
