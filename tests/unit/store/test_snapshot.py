"""Snapshot files: what is written reads back, and nothing else does."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from serve_app.errors import SnapshotError
from serve_app.records import Record, make_record
from serve_app.store.snapshot import Entry, SnapshotWriter, read_page, snapshot_files


def part(seed: int, experts: int = 300) -> Record:
    ids = np.random.default_rng(seed).integers(0, experts, (4, 3, 2))
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
    writer.write(entries, [record.ids for record in records])
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
