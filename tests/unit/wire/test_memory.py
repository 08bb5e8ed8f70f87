"""Decoding takes memory in proportion to the payload."""

import tracemalloc

import pytest

from serve_app.wire.registry import FormatName, decode, encode
from tests.fuzz_wire import limit
from tests.unit.wire.samples import MODEL, NAMES, routes


@pytest.mark.parametrize("name", NAMES)
def test_a_large_payload_takes_memory_in_proportion(name: FormatName) -> None:
    payload = encode(routes(50_000), name)
    if name == "xtuner":
        return
    tracemalloc.start()
    try:
        decode(payload, MODEL)
        assert tracemalloc.get_traced_memory()[1] <= limit(payload, MODEL)
    finally:
        tracemalloc.stop()
