"""Children of a parent: what they store, and that their key reads as the whole sequence."""

import numpy as np
import pytest

from serve_app.assemble.joining import joined
from serve_app.config import StoreArgs
from serve_app.continuing import covered, put_continued
from serve_app.errors import KeyReleased, RecordError
from serve_app.records import Record, make_record
from serve_app.store.owner.memory import MemoryStore
from tests.distinct_ids import distinct_ids


class Elsewhere(MemoryStore):
    """A store whose records all lie on another node."""

    def is_local(self, key: str) -> bool:
        return False


def part(start: int, rows: int, seed: int, experts: int = 16) -> Record:
    ids = distinct_ids((rows, 3, 2), experts, seed)
    return make_record(ids, num_experts=experts, start=start)


def put_both(store: MemoryStore, first: Record, second: Record) -> str:
    parent = store.put(first)
    put = put_continued(store, second, parent)
    store.release([parent])
    return put.key


@pytest.mark.parametrize("kind", [MemoryStore, Elsewhere])
@pytest.mark.parametrize(("start", "rows"), [(5, 4), (3, 6), (0, 9), (2, 2)])
def test_a_childs_key_reads_as_the_whole_sequence(
    kind: type[MemoryStore], start: int, rows: int
) -> None:
    store = kind("unit", StoreArgs(backend="memory"))
    first, second = part(0, 5, 1), part(start, rows, 2)
    key = put_both(store, first, second)
    (segments,) = store.fetch([key])
    assert isinstance(segments, list)
    whole = joined(segments)
    np.testing.assert_array_equal(whole.ids[:5], first.ids)
    np.testing.assert_array_equal(whole.ids[5:], second.ids[max(0, 5 - start) :])
    assert whole.valid.all()


def test_rows_that_the_parent_has_are_not_stored_again() -> None:
    store = MemoryStore("unit", StoreArgs(backend="memory"))
    put_both(store, part(0, 100, 1), part(0, 110, 2))
    assert store.stats().live_bytes == part(0, 110, 0).meta.nbytes


def test_coverage_ends_at_the_first_gap() -> None:
    assert covered([part(0, 3, 1).meta, part(3, 2, 1).meta, part(7, 2, 1).meta]) == 5
    assert covered([part(1, 3, 1).meta]) == 0


def test_a_gap_before_the_child_stays_invalid() -> None:
    whole = joined([part(0, 2, 1), part(4, 1, 2)])
    assert whole.valid.tolist() == [True, True, False, False, True]


def test_a_parent_of_another_model_or_released_is_refused() -> None:
    store = MemoryStore("unit", StoreArgs(backend="memory"))
    parent = store.put(part(0, 5, 1))
    with pytest.raises(RecordError, match=r"16, \(0, 1, 2\)\), got \(3, 2, 32"):
        put_continued(store, part(5, 1, 2, experts=32), parent)
    store.release([parent])
    with pytest.raises(KeyReleased):
        put_continued(store, part(5, 1, 2), parent)
