"""Our own format: it keeps everything, copies nothing and notices every changed bit."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import RecordError
from serve_app.records import Record, Track, checksum, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.formats.ours import from_bytes, to_bytes
from serve_app.wire.registry import decode
from tests.distinct_ids import distinct_ids
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
    raw = to_bytes(make_record(distinct_ids((9, 3, 2), 300), num_experts=300))
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


def crafted(header: bytes, body: bytes = b"", version: int = 2, sealed: bytes = b"") -> bytes:
    seal = checksum(np.frombuffer(header + sealed, np.uint8))
    return struct.pack("<8sHHIQ", b"r3serve\0", version, 0, len(header), seal) + header + body


def taken_apart(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack_from("<I", raw, 12)[0]
    return json.loads(raw[24 : 24 + size]), raw[24 + size :]


def header_with(**changes: Any) -> bytes:
    fields, body = taken_apart(to_bytes(routes()))
    return crafted(json.dumps({**fields, **changes}).encode(), body)


def track_with(**changes: Any) -> bytes:
    """A record with a track whose header says something else."""
    fields, body = taken_apart(to_bytes(routes(tracks={"score": np.zeros(4, np.float32)})))
    fields["tracks"][0] |= changes
    text = json.dumps(fields).encode()
    return crafted(text + b" " * (-(len(text) + 24) % 16), body)


def test_ours_keeps_every_kind_of_track() -> None:
    ragged = Track(np.arange(5, dtype=np.int32), np.array([0, 0, 2, 2, 5]))
    record = routes(
        valid=np.array([True, False, True, True]),
        tokens=[7, 8, 9, 10],
        tracks={
            "support": ragged,
            "indexer": np.arange(24, dtype=np.uint16).reshape(4, 3, 2),
            "score": np.linspace(0, 1, 4),
        },
    )
    raw = to_bytes(record)
    found = from_bytes(raw)
    assert found.meta == record.meta
    assert found.tracks.keys() == record.tracks.keys()
    for name, track in record.tracks.items():
        np.testing.assert_array_equal(found.tracks[name].values, track.values)
    assert found.tracks["support"].offsets is not None
    assert found.tracks["support"].offsets.tolist() == [0, 0, 2, 2, 5]
    assert np.shares_memory(found.tracks["indexer"].values, np.frombuffer(raw, np.uint8))
    alone = from_bytes(to_bytes(Record(record.meta, record.ids)))
    assert alone.meta == record.meta._replace(tracks=())
    for bit in range(8 * len(raw)):
        bent = bytearray(raw)
        bent[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            from_bytes(bent)


def test_the_version_before_is_read_without_its_hash() -> None:
    record = routes(start=3, weight_version=5)
    fields, body = taken_apart(to_bytes(record))
    before = {name: fields[name] for name in fields if name not in ("tracks", "unrouted")}
    before["token_hash"] = "0" * 16
    raw = crafted(json.dumps(before).encode(), body, version=1)
    assert from_bytes(raw).meta == record.meta
    with pytest.raises(RecordError, match="'tracks' too"):
        from_bytes(crafted(json.dumps({**before, "tracks": []}).encode(), body, version=1))


def test_the_rows_that_nobody_routed_come_along() -> None:
    ids = routes().ids.copy()
    ids[2, 1] = 7
    record = make_record(ids, num_experts=300, moe_layers=(1, 2), valid=np.arange(4) != 0)
    assert (record.meta.invalid, record.meta.unrouted_rows) == ((0, 2), (2,))
    assert from_bytes(to_bytes(record)).meta == record.meta
    fields, body = taken_apart(to_bytes(record))
    bits = body[record.ids.nbytes :]
    once = crafted(json.dumps({**fields, "unrouted": 1}).encode(), body, sealed=bits)
    assert from_bytes(once).meta.unrouted == 1  # of those how many there were was said


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
        (header_with(checksum="x"), "16 hex digits"),
        (header_with(unrouted=1), r"unrouted as an integer in \[0, 0\]"),
        (header_with(unrouted=[0]), "unrouted rows among those that are not valid"),
        (header_with(unrouted=[-1]), "each of unrouted as an integer"),
        (header_with(tracks={}), "tracks as a list of up to 16"),
        (header_with(tracks=[{}] * 17), "tracks as a list of up to 16"),
        (header_with(tracks=[{}]), "name is missing"),
        (track_with(name="Score"), "a track's name in lower case"),
        (track_with(name="x" * 65), "a track's name, got"),
        (track_with(name=["score"]), "a track's name, got"),
        (track_with(dtype="|O"), "a track's dtype as one of"),
        (track_with(shape=[2**41]), "each size of a track's shape"),
        (track_with(shape=[1, 1, 1, 1]), "a track's shape as a list of fewer than 4"),
        (track_with(shape=[2**40, 2**40, 0]), "a track of at most"),
        (track_with(shape=[2]), r"expected \d+ bytes of a record"),
        (track_with(values=2**40), r"expected \d+ bytes of a record"),
        (track_with(values=-1), "values as an integer"),
        (track_with(checksum="0" * 16), "expected a track TrackMeta"),
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
