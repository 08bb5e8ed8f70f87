"""Keys are told from payloads, and go through the store."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.client.reading import Reader
from serve_app.config import StoreArgs
from serve_app.errors import RecordError, UnknownKey
from serve_app.records import make_record, raw_record
from serve_app.store.keys import Key
from serve_app.store.owner.memory import MemoryStore
from serve_app.wire.expected import Expected
from serve_app.wire.payloads.keyed import is_key
from serve_app.wire.registry import FormatName, decode, encode
from tests.unit.wire.samples import MODEL, NAMES, routes, same


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


class Graph:
    """The one thing of a served graph that decoding needs: its store."""

    def __init__(self) -> None:
        self.app = "unit"
        self.store = MemoryStore(self.app, StoreArgs(backend="memory"))


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


def test_what_was_put_through_shared_store_is_looked_at_when_its_model_is_named() -> None:
    graph = Graph()
    reader = Reader(graph)  # type: ignore[arg-type]
    ids = routes().ids.astype(np.uint16)
    ids[2] = 0
    key = graph.store.put(raw_record(ids))
    found = reader.decode(key, MODEL, False)
    assert (found.meta.invalid, found.meta.unrouted_rows) == ((2,), (2,))
    with pytest.raises(RecordError, match="got 1 rows that repeat one"):
        reader.decode(key, Expected(3, 2, 16, (1, 2), repeats="refuse"), False)
    blank = graph.store.put(raw_record(np.zeros((4, 3, 2), np.uint16)))
    with pytest.raises(RecordError, match="expected routes, got all zeros"):
        reader.decode(blank, MODEL, False)


def test_a_key_with_a_parent_is_held_to_what_its_engine_promises() -> None:
    graph = Graph()
    reader = Reader(graph)  # type: ignore[arg-type]
    ids = routes().ids.copy()
    ids[1] = 0
    first = make_record(ids, num_experts=16, moe_layers=(1, 2))
    second = make_record(routes().ids, num_experts=16, moe_layers=(1, 2), start=4)
    key = graph.store.put(second, parent=graph.store.put(first))
    assert reader.get(key).meta.unrouted_rows == (1,)
    assert reader.decode(key, MODEL, False).meta.invalid == (1,)
    with pytest.raises(RecordError, match="got 1 rows that repeat one"):
        reader.decode(key, Expected(3, 2, 16, (1, 2), repeats="refuse"), False)
