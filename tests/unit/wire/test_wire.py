"""Wire formats: what each engine writes comes back as the same record, and nothing else does."""

import base64
import io
import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.client.reading import Reader
from serve_app.config import StoreArgs
from serve_app.errors import RecordError, UnknownKey
from serve_app.records import Record, checksum, make_record, raw_record
from serve_app.store.keys import Key
from serve_app.store.owner.memory import MemoryStore
from serve_app.wire.expected import Expected
from serve_app.wire.formats.ours import from_bytes, to_bytes
from serve_app.wire.payloads.keyed import is_key
from serve_app.wire.registry import FORMATS, FormatName, decode, encode
from tests.fuzz_wire import limit

NAMES: list[FormatName] = list(FORMATS)
SAY_START: tuple[FormatName, ...] = ("r3serve", "prime_rl", "sglang_tagged")
SAY_VALID = ("r3serve", "nemo_rl")
MODEL = Expected(layers=3, top_k=2, num_experts=16, moe_layers=(1, 2))


def routes(rows: int = 4, **how: Any) -> Record:
    ids = np.random.default_rng(rows).integers(0, 16, (rows, 3, 2))
    return make_record(ids, num_experts=16, moe_layers=(1, 2), **how)


def same(found: Record, wanted: Record) -> None:
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.valid, wanted.valid)
    assert found.ids.dtype == wanted.ids.dtype
    assert found.moe_layers == wanted.moe_layers
    assert (found.start, found.num_experts) == (wanted.start, wanted.num_experts)
    found.meta.verify(found.ids)


@st.composite
def models(draw: st.DrawFn) -> tuple[Record, Expected]:
    layers, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    experts = draw(st.sampled_from([4, 128, 129, 255, 256, 257, 32_768, 32_769, 65_535]))
    moe = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    rows, start = draw(st.integers(1, 9)), draw(st.integers(0, 2**40))
    values = np.random.default_rng(draw(st.integers(0, 99)))
    ids = values.integers(0, experts, (rows, layers, top_k))
    ids[-1] = experts - 1
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


def test_every_cut_of_every_format_is_noticed() -> None:
    for name in NAMES:
        payload = encode(routes(), name)
        if isinstance(payload, dict):
            text = "data" if "data" in payload else "routed_experts"
            cuts = [{**payload, text: payload[text][:n]} for n in range(len(payload[text]))]
        else:
            cuts = [payload[:n] for n in range(len(payload))]
        whole = Expected(3, 2, 16, (1, 2), rows=4)
        for cut in cuts:
            with pytest.raises(RecordError):
                decode(cut, whole, format=name, allow_pickle=True)


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


def npy(ids: Any, **how: Any) -> str:
    file = io.BytesIO()
    np.save(file, ids, **how)
    return base64.b64encode(file.getvalue()).decode()


def npy_header(text: str) -> str:
    header = text.encode() + b"\n"
    return base64.b64encode(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header).decode()


IDS = np.arange(24, dtype=np.uint8).reshape(4, 3, 2) % 16
FULL = Expected(3, 2, 16)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 3, 2), }"),
         "expected 6000000000000 bytes of uint8.*, got 0"),
        (npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3, 2), }"), "npy header"),
        (npy_header("__import__('os').abort()"), "npy header"),
        (npy_header("(" * 900), "npy header"),
        (npy(IDS.astype(float)), "npy header of integers"),
        (npy(IDS[0]), "npy header of integers"),
        (npy(np.array([[[IDS]]], dtype=object), allow_pickle=True), "npy header"),
        (base64.b64encode(b"\x93NUMPY\7\0" + b"x" * 40).decode(), "version 1, 2 or 3"),
        (npy(IDS)[:-4], r"expected 24 bytes of uint8\[4, 3, 2\] in .npy, got 2\d"),
        (npy(IDS) + "!", "base64 text of"),
        ("nrlre1:int8:1000000000000x3x2:", "expected 6000000000000 bytes of int8"),
        ("nrlre1:int8:4x3x2:AAAA", r"24 bytes of int8\[4, 3, 2\] as base64, got 4 characters"),
        ("nrlre1:int8:4x3:AAAA", "nrlre1:<dtype>"),
        ("nrlre1:int64:4x3x2:AAAA", "dtype as one of int8, int16, int32, got 'int64'"),
        ("nrlre1:int8:4x9x2:AAAA", r"ids \[rows, 3, 2\], got list\[4, 9, 2\]"),
        ({"data": "", "shape": [10**12, 3, 2], "dtype": "uint8"}, "expected 6000000000000 bytes"),
        ({"data": "A" * 32, "shape": [4, 3, 2], "dtype": "float32"}, "dtype as one of"),
        ({"data": "A" * 31 + "!", "shape": [4, 3, 2], "dtype": "uint8"}, "base64 text"),
        ({"data": "A" * 31 + "é", "shape": [4, 3, 2], "dtype": "uint8"}, "base64 text"),
        ({"data": b"", "shape": [4, 3, 2], "dtype": "uint8"}, "expected base64 text, got b''"),
        ({"data": "", "shape": "4x3", "dtype": "uint8"}, "shape as"),
        ({"data": "", "shape": [4, 3, 2], "dtype": "uint8", "zip": 1}, "got 'zip' too"),
        ({"data": "", "shape": [4, 3, 2], "start": -1}, "start as an integer"),
        ({"data": "", "shape": [4, 3, 2], "start": True}, "start as an integer"),
        ({"routed_experts": None}, "expected base64 text, got None"),
        ({"routed_experts": "AAAA", "routed_experts_dtype": "int8"}, "int32, uint16, uint8"),
        ({"routed_experts": [[[1]]]}, "expected base64 text, got list"),
        ({"some": "thing"}, "like none of them"),
        ("AAAAAAAA", r"base64 of int32\[rows, 3, 2\], got 8 characters"),
        ("hello, world", "like none of them"),
        ("", "like none of them"),
        (None, "got None, like none of them"),
        (10**400, "int of 1329 bits, like none"),
        ([], r"a list \[rows\]\[layers\]\[top_k\], got list\[\]"),
        ([[[1, 2], [3, 4], [5, 16]]], r"ids must be in \[0, 16\), got 16"),
        ([[[1, 2], [3, 4], [5, 2**31]]], "one beyond 32 bits"),
        ([[[1, 2], [3, 4], [5, 10**5_000]]], "one beyond 32 bits"),
        ([[[1, 2], [3, 4], [5, -1]]], "got -1"),
        ([[[1, 2], [3, 4], [5, 6.0]]], "ids as integers, got float"),
        ([[[1, 2], [3, 4], [5, "6"]]], "ids as integers, got str"),
        ([[[1, 2], [3, 4], [5, True]]], "ids as integers, got bool"),
        ([[[1, 2], [3, 4], [5]]], r"lists of 2 \(top_k\), got one of 1"),
        ([[[1, 2], [3, 4], 5]], r"lists of 2 \(top_k\), got int"),
        ([[[1, 2]] * 3, [[1, 2]] * 2], r"lists of 3 \(layers\), got one of 2"),
        ([[[1, 2]] * 4], r"ids \[rows, 3, 2\], got list\[1, 4, 2\]"),
        ([[[[1, 1], [2, 2]]] * 3], "ids as integers, got list"),
        (IDS.astype(np.float32), r"integer ids, got float32\[4, 3, 2\]"),
        (IDS.astype(object), "integer ids, got object"),
        (IDS > 3, "integer ids, got bool"),
        (IDS[:0], r"ids \[rows, 3, 2\]"),
        (IDS[..., None], r"ids \[rows, 3, 2\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(payload: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode(payload, FULL)


def deep_list(depth: int) -> Any:
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    return nested


def test_lists_too_deep_are_refused_however_deep() -> None:
    for depth in (1, 2, 4, 65, 50_000):
        with pytest.raises(RecordError):
            decode(deep_list(depth), Expected(1, 1, 4))


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


@pytest.mark.parametrize("name", NAMES)
def test_moe_layers_alone_go_to_their_global_columns(name: FormatName) -> None:
    record = routes()
    narrow = make_record(record.ids[:, 1:], num_experts=16)
    if name == "r3serve":
        return
    wanted = Expected(3, 2, 16, (1, 2), rows=4)
    same(decode(encode(narrow, name), wanted, allow_pickle=True), record)


@pytest.mark.parametrize("name", NAMES)
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


def test_a_text_without_shape_is_all_layers_unless_the_rows_are_known() -> None:
    six_by_two = make_record(np.zeros((6, 2, 2), int), num_experts=16)
    payload = encode(six_by_two, "sglang")
    assert decode(payload, MODEL).meta.rows == 4
    assert decode(payload, Expected(3, 2, 16, (1, 2), rows=6)).meta.rows == 6
    with pytest.raises(RecordError, match=r"int32\[5, 3, 2\]"):
        decode(payload, Expected(3, 2, 16, (1, 2), rows=5))


def test_nemo_rl_rows_of_minus_one_and_damaged_rows() -> None:
    ids = routes().ids.astype(np.int16)
    ids[1] = -1
    text = f"nrlre1:int16:4x3x2:{base64.b64encode(ids.tobytes()).decode()}"
    assert decode(text, MODEL).valid.tolist() == [True, False, True, True]
    ids[2, 2, 0] = -1
    text = f"nrlre1:int16:4x3x2:{base64.b64encode(ids.tobytes()).decode()}"
    with pytest.raises(RecordError, match="got row 2 with both"):
        decode(text, MODEL)


def test_what_engines_write_byte_for_byte() -> None:
    expected = Expected(1, 2, 16)
    for payload in (
        "AQAAAAIAAAA=",  # SGLang's int32
        {"routed_experts": "AQI=", "routed_experts_dtype": "uint8", "id": "meta_info has more"},
        {"routed_experts": "AQAAAAIAAAA="},
        npy(np.array([[[1, 2]]], np.uint8)),
        npy(np.asfortranarray([[[1, 2]]]).astype(">i4")),
        {"data": "AQI=", "shape": [1, 1, 2], "start": 0},  # prime-rl before it said the dtype
        {"data": "AQACAA==", "shape": [1, 1, 2], "start": 0, "dtype": "uint16"},
        {"data": "AQACAA==", "shape": [1, 1, 2], "dtype": "int16"},
        "nrlre1:int16:1x1x2:AQACAA==",
        [[[1, 2]]],
    ):
        assert decode(payload, expected).ids.tolist() == [[[1, 2]]]


def test_a_fortran_ordered_npy_keeps_its_rows() -> None:
    np.testing.assert_array_equal(decode(npy(np.asfortranarray(IDS)), FULL).ids, IDS)


def test_the_start_that_a_payload_says_must_be_the_callers() -> None:
    wrong = Expected(3, 2, 16, (1, 2), start=9)
    for name in SAY_START:
        with pytest.raises(RecordError, match="from position 9 on, got 4"):
            decode(encode(routes(start=4), name), wrong)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_read_for_allow_pickle_alone(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    bomb = base64.b64encode(pickle.dumps(Bomb(path), protocol=5)).decode()
    for name in (None, *NAMES):
        with pytest.raises(RecordError):
            decode(bomb, MODEL, format=name)
    with pytest.raises(RecordError, match="allow_pickle=True"):
        FORMATS["xtuner"].decode(bomb, MODEL)
    assert not path.exists()
    with pytest.raises(RecordError, match="got None"):
        decode(bomb, MODEL, allow_pickle=True)
    assert path.exists()
    listed = base64.b64encode(pickle.dumps(routes().ids.tolist(), protocol=4)).decode()
    same(decode(listed, MODEL, allow_pickle=True), routes())
    with pytest.raises(RecordError, match="pickled array, got"):
        decode(listed[:40], MODEL, allow_pickle=True)


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


@given(app=st.text(min_size=1, max_size=60), seq=st.integers(0, 2**64 - 1))
def test_keys_are_told_from_payloads(app: str, seq: int) -> None:
    key = Key(app[:60], "0011223344", 5, seq).sign(b"secret")
    for text in (key, "0123456789abcdef" * 3 + "01000000"):
        assert is_key(text)
        with pytest.raises(RecordError, match=r"RoutedExpertsClient\.decode"):
            decode(text, MODEL)


@pytest.mark.parametrize("name", NAMES)
def test_no_payload_looks_like_a_key(name: FormatName) -> None:
    for rows in (1, 2, 3, 9, 200):
        assert not is_key(encode(routes(rows), name))


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


class Graph:
    """The one thing of a served graph that decoding needs: its store."""

    def __init__(self) -> None:
        self.store = MemoryStore("unit", StoreArgs(backend="memory"))


def test_a_key_goes_through_the_store_and_anything_else_does_not() -> None:
    graph = Graph()
    reader = Reader(graph)  # type: ignore[arg-type]
    key = graph.store.put(routes(start=3))
    same(reader.decode(key, MODEL, False), routes(start=3))
    with pytest.raises(RecordError, match="routes of 17 experts, got 16"):
        reader.decode(key, Expected(3, 2, 17, (1, 2)), False)
    ids = routes().ids.astype(np.uint16)
    ids[:, 0] = 65_535
    same(reader.decode(graph.store.put(raw_record(ids)), MODEL, False), routes())
    same(reader.decode(ids.tolist(), MODEL, False), routes())
    told = Expected(3, 2, 16, (1, 2), rows=3, extra_rows=1)
    cut = make_record(routes().ids[:3], num_experts=16, moe_layers=(1, 2))
    same(reader.decode(graph.store.put(raw_record(ids)), told, False), cut)
    same(reader.decode(graph.store.put(routes()), told, False), cut)
    with pytest.raises(UnknownKey):
        reader.decode("ab" * 28, MODEL, False)
    with pytest.raises(RecordError, match="allow_pickle"):
        reader.decode(encode(routes(), "xtuner"), MODEL, False)
    same(reader.decode(encode(routes(), "xtuner"), MODEL, True), routes())
