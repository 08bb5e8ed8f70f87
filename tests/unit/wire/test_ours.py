"""Our own format: it keeps everything, copies nothing and notices every changed bit."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import RecordError
from serve_app.records import checksum, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.formats.ours import from_bytes, to_bytes
from serve_app.wire.registry import decode
from tests.unit.wire.samples import MODEL, routes, same


@given(
    rows=st.integers(1, 40),
    bits=st.integers(0, 2**40 - 1),
    tokens=st.booleans(),
    version=st.integers(-1, 2**62),
)
def test_ours_keeps_everything(rows: int, bits: int, tokens: bool, version: int) -> None:
    valid = np.array([bool(bits >> row & 1) for row in range(rows)])
    record = routes(
        rows,
        start=7,
        valid=valid,
        weight_version=version,
        tokens=list(range(rows)) if tokens else None,
    )
    found = from_bytes(bytearray(to_bytes(record)))
    assert found.meta == record.meta
    np.testing.assert_array_equal(found.ids, record.ids)
    assert not found.ids.flags.writeable


def test_ours_copies_nothing_where_every_layer_is_moe() -> None:
    raw = to_bytes(make_record(np.ones((9, 3, 2), int), num_experts=300))
    found = from_bytes(raw)
    assert np.shares_memory(found.ids, np.frombuffer(raw, np.uint8))
    assert found.ids.flags.aligned


def test_every_flipped_bit_of_ours_is_noticed() -> None:
    raw = to_bytes(routes(3, valid=np.array([True, False, True]), tokens=[1, 2, 3]))
    for bit in range(8 * len(raw)):
        bent = bytearray(raw)
        bent[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            from_bytes(bent)


def test_an_unknown_version_of_ours_is_refused_by_its_number() -> None:
    raw = bytearray(to_bytes(routes()))
    raw[8:10] = struct.pack("<H", 513)
    with pytest.raises(RecordError, match="got version 513"):
        decode(raw, MODEL)


def crafted(header: bytes, body: bytes = b"") -> bytes:
    seal = checksum(np.frombuffer(header, np.uint8))
    return struct.pack("<8sHHIQ", b"r3serve\0", 1, 0, len(header), seal) + header + body


def header_with(**changes: Any) -> bytes:
    raw = to_bytes(routes())
    size = struct.unpack_from("<I", raw, 12)[0]
    fields = {**json.loads(raw[24 : 24 + size]), **changes}
    return crafted(json.dumps(fields).encode(), raw[24 + size :])


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (header_with(shape=[10**12, 3, 2]), r"expected \d{13} bytes of a record uint8"),
        (header_with(shape=[4, 3]), "shape as"),
        (header_with(shape=[4, 3, True]), "each size of shape as an integer"),
        (header_with(shape=[4, -3, -2]), "each size of shape"),
        (header_with(num_experts=0), "num_experts as an integer"),
        (header_with(num_experts=65_536), "num_experts must be in"),
        (header_with(num_experts=2), r"ids must be in \[0, 2\)"),
        (header_with(moe_layers=[1, 10**30]), "each of moe_layers"),
        (header_with(moe_layers=[1, 9]), "moe_layers must be ascending"),
        (header_with(moe_layers="12"), "moe_layers as a list"),
        (header_with(moe_layers=[2]), "zeros in the columns of dense layers"),
        (header_with(checksum="0" * 16), "ids of checksum 0{16}"),
        (header_with(checksum=5), "16 hex digits"),
        (header_with(token_hash="x"), "16 hex digits"),
        (header_with(valid=1), "valid as true or false"),
        (header_with(valid=True), r"expected \d+ bytes of a record"),
        (header_with(start=-1), "start as an integer"),
        (header_with(start=2**63), "start as an integer"),
        (header_with(weight_version=1.5), "weight_version as an integer"),
        (header_with(compression="zstd"), "got 'compression' too"),
        (crafted(b"[" * 60_000), "JSON header, got maximum recursion"),
        (crafted(b"\xff"), "JSON header"),
        (crafted(b"null"), "an object of shape"),
        (crafted(b"1" * 5_000), "JSON header"),
        (crafted(b" " * 65_537), "a header of at most 65536 bytes, got 65537"),
        (to_bytes(routes()) + b"\0", r"expected \d+ bytes of a record"),
        (to_bytes(routes())[:20], "at least 24 bytes"),
        (b"", "got 0 bytes"),
        (memoryview(to_bytes(routes()))[::2], "contiguous"),
    ],
)
def test_bytes_that_to_bytes_never_wrote(payload: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode(payload, MODEL, format="r3serve")


def test_ours_and_the_caller_must_agree() -> None:
    raw = to_bytes(routes(start=5, weight_version=13))
    same(decode(raw, Expected(3, 2, 16, (1, 2), 4, 5, 13)), routes(start=5))
    for other, message in (
        (Expected(3, 2, 17, (1, 2)), "routes of 17 experts, got 16"),
        (Expected(3, 2, 16), r"MoE layers \[0, 1, 2\], got tuple\[1, 2\]"),
        (Expected(3, 2, 16, (1, 2), start=6), "from position 6 on, got 5"),
        (Expected(3, 2, 16, (1, 2), weight_version=12), "weight version 12, got 13"),
    ):
        with pytest.raises(RecordError, match=message):
            decode(raw, other)
