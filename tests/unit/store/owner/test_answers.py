"""A read's answer brings every header and every place back."""

import numpy as np

from serve_app.errors import KeyReleased
from serve_app.records import ROUTES, make_record, raw_record
from serve_app.store.owner.answers import SMALL, Collected, ids_of
from tests.distinct_ids import distinct_ids

TOKENS = b"the tokens of five rows"


def test_headers_of_several_models_come_back_unchanged() -> None:
    def ids(layers: int) -> np.ndarray:
        return distinct_ids((5, layers, 2), 60, seed=layers)

    valid = np.array([True, False, True, True, False])
    metas = [
        make_record(ids(3), num_experts=64, tokens=[1, 2, 3, 4, 5], weight_version=7).meta,
        make_record(ids(3), num_experts=64, start=5, valid=valid).meta,
        make_record(ids(4), num_experts=300, moe_layers=[1, 3]).meta,
        raw_record(ids(4).astype(np.int32)).meta,
        make_record(ids(3), num_experts=64, weight_version=8).meta,
    ]
    collected = Collected((ROUTES, "tokens"))
    collected.add([(metas[0], (b"first", TOKENS), 5), (metas[1], (b"second",), 5)])
    collected.miss(KeyReleased("the key was released"))
    for meta in metas[2:]:
        collected.add([(meta, (b"alone",), meta.rows)])
    found = collected.answer().found
    headers = [[one[0] for one in chain] for chain in found if isinstance(chain, list)]
    assert headers == [metas[:2], *([meta] for meta in metas[2:])]
    assert isinstance(found[1], KeyReleased)
    assert isinstance(found[0], list)
    assert [place is None for place in found[0][0][1]] == [False, False]
    assert [place is None for place in found[0][1][1]] == [False, True]


def test_a_reader_of_routes_is_spared_the_tracks() -> None:
    meta = make_record(distinct_ids((5, 3, 2), 60), num_experts=64, tokens=[1, 2, 3, 4, 5]).meta
    alone, both = Collected(), Collected((ROUTES, "tokens"))
    for collected in (alone, both):
        collected.add([(meta, (b"routes..", TOKENS), 5)])
    (chain,) = alone.answer().found
    assert isinstance(chain, list)
    assert chain[0][0] == meta._replace(tracks=())
    assert bytes(alone.answer().small[:8]) == b"routes.."
    assert TOKENS not in bytes(alone.answer().small)
    assert TOKENS in bytes(both.answer().small)
    assert len(alone.answer().packed) < len(both.answer().packed)


def test_small_records_of_any_length_come_back_unchanged() -> None:
    """Each begins where its dtype may begin, and the reader copies nothing."""
    experts = (64, 300, 64, 70, 300)
    records = [
        make_record(distinct_ids((rows, 3, 1), 60, seed=rows), num_experts=count)
        for rows, count in enumerate(experts, 1)
    ]
    collected = Collected()
    for record in records:
        collected.add([(record.meta, (record.ids.tobytes(),), record.meta.rows)])
    answer = collected.answer()
    for record, found in zip(records, answer.found, strict=True):
        assert isinstance(found, list)
        ((meta, (place,), rows),) = found
        assert place is not None
        number, offset = place
        assert (number, rows) == (SMALL, meta.rows)
        ids = ids_of(meta, answer.small, offset)
        assert np.array_equal(ids, record.ids)
        assert ids.dtype == record.ids.dtype
        assert ids.flags.aligned
        assert not ids.flags.writeable
        assert np.shares_memory(ids, answer.small)
