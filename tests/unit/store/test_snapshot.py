"""Snapshot files: what is written reads back, and nothing else does."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from serve_app.errors import SnapshotError
from serve_app.records import Record, checksum, make_record
from serve_app.store.snapshot import Entry, SnapshotWriter, read_page, snapshot_files
from tests.distinct_ids import distinct_ids


def part(seed: int, experts: int = 300) -> Record:
    ids = distinct_ids((4, 3, 2), experts, seed)
    valid = np.array([True, False, True, True])
    return make_record(
        ids, num_experts=experts, valid=valid, moe_layers=(0, 2), tokens=[1, 2, 3, 4]
    )


def write(path: Path, count: int = 3) -> list[Record]:
    records = [part(seed) for seed in range(count)]
    entries = [
        Entry(f"key-{i}", f"key-{i - 1}" if i else None, "tag", 60.0, i != 0, record.meta)
        for i, record in enumerate(records)
    ]
    writer = SnapshotWriter(path, "unit", b"secret")
    writer.write(entries, records)
    assert not path.exists()
    assert writer.commit().records == count
    return records


def test_what_was_written_reads_back_and_only_its_owner_may(tmp_path: Path) -> None:
    records = write(tmp_path / "snap")
    assert stat.S_IMODE((tmp_path / "snap").stat().st_mode) == 0o700
    (file,) = snapshot_files(tmp_path / "snap")
    page = read_page(file, "unit")
    assert page.secret == b"secret"
    assert [entry.parent for entry in page.entries] == [None, "key-0", "key-1"]
    for got, put in zip(page.records, records, strict=True):
        assert got.meta == put.meta
        np.testing.assert_array_equal(got.ids, put.ids)
        assert got.tokens is not None
        assert got.tokens.tolist() == [1, 2, 3, 4]


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path) -> None:
    write(tmp_path / "snap")
    with pytest.raises(SnapshotError, match="exists already"):
        SnapshotWriter(tmp_path / "snap", "unit", b"secret")
    writer = SnapshotWriter(tmp_path / "other", "unit", b"secret")
    writer.write([], [])
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["snap"]


@given(cut=st.integers(1, 400))
def test_a_torn_file_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn") / "snap"
    write(folder)
    (file,) = snapshot_files(folder)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(SnapshotError, match="part-00000"):
        read_page(file, "unit")


def test_altered_bytes_headers_and_applications_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "snap")
    (file,) = snapshot_files(tmp_path / "snap")
    whole = file.read_bytes()
    arrays = load_file(file)
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    with pytest.raises(SnapshotError, match="application 'other', got 'unit'"):
        read_page(file, "other")
    arrays["1"][2, 0, 0] ^= 1
    save_file(arrays, file, metadata)
    with pytest.raises(SnapshotError, match="checksum"):
        read_page(file, "unit")
    file.write_bytes(whole.replace(b'\\"tag\\"', b'\\"tug\\"'))
    with pytest.raises(SnapshotError, match="altered"):
        read_page(file, "unit")
    with pytest.raises(SnapshotError, match="no snapshot"):
        snapshot_files(tmp_path)


def test_a_snapshot_of_the_format_before_reads_without_its_token_hashes(tmp_path: Path) -> None:
    """As it was written before records had tracks."""
    whole = part(3)
    ids = whole.ids.copy()
    ids[2] = 0  # which nobody looked at then
    record = Record(whole.meta._replace(checksum=checksum(ids)), ids)
    header = {
        "rows": 4,
        "layers": 3,
        "top_k": 2,
        "num_experts": 300,
        "start": 0,
        "moe_layers": [0, 2],
        "weight_version": 0,
        "checksum": record.meta.checksum,
        "token_hash": 12345,
        "invalid": [1],
        "format_version": 1,
        "raw": None,
    }
    entry = {"key": "k", "parent": None, "tag": "t", "lease_s": 60.0, "live": True, "meta": header}
    listed = json.dumps([entry])
    metadata = {
        "format": "r3serve-snapshot-1",
        "app": "unit",
        "secret": b"secret".hex(),
        "records": listed,
        "hash": xxhash.xxh3_64_hexdigest(listed.encode()),
    }
    file = tmp_path / "part-00000.safetensors"
    save_file({"0": record.ids}, file, metadata)
    page = read_page(file, "unit")
    seen = record.meta._replace(tracks=(), invalid=(1, 2), unrouted_rows=(2,))
    assert page.entries == [Entry("k", None, "t", 60.0, True, seen)]
    np.testing.assert_array_equal(page.records[0].ids, record.ids)
    assert page.records[0].tokens is None
