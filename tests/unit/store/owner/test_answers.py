"""A read's answer brings every header and every place back."""

import numpy as np

from serve_app.errors import KeyReleased
from serve_app.records import make_record, raw_record
from serve_app.store.owner.answers import SMALL, Collected, ids_of


def test_headers_of_several_models_come_back_unchanged() -> None:
    def ids(layers: int) -> np.ndarray:
        return np.random.default_rng(layers).integers(0, 60, (5, layers, 2))

    valid = np.array([True, False, True, True, False])
    metas = [
        make_record(ids(3), num_experts=64, tokens=[1, 2, 3, 4, 5], weight_version=7).meta,
        make_record(ids(3), num_experts=64, start=5, valid=valid).meta,
        make_record(ids(4), num_experts=300, moe_layers=[1, 3]).meta,
        raw_record(ids(4).astype(np.int32)).meta,
        make_record(ids(3), num_experts=64, weight_version=8).meta,
    ]
    collected = Collected()
    collected.add([(metas[0], b"first"), (metas[1], b"second")])
    collected.miss(KeyReleased("the key was released"))
    for meta in metas[2:]:
        collected.add([(meta, b"alone")])
    found = collected.answer().found
    headers = [[meta for meta, _ in chain] for chain in found if isinstance(chain, list)]
    assert headers == [metas[:2], *([meta] for meta in metas[2:])]
    assert isinstance(found[1], KeyReleased)


def test_small_records_of_any_length_come_back_unchanged() -> None:
    """Each begins where its dtype may begin, and the reader copies nothing."""
    experts = (64, 300, 64, 70, 300)
    records = [
        make_record(np.random.default_rng(rows).integers(0, 60, (rows, 3, 1)), num_experts=count)
        for rows, count in enumerate(experts, 1)
    ]
    collected = Collected()
    for record in records:
        collected.add([(record.meta, record.ids.tobytes())])
    answer = collected.answer()
    for record, found in zip(records, answer.found, strict=True):
        assert isinstance(found, list)
        ((meta, (number, offset)),) = found
        assert number == SMALL
        ids = ids_of(meta, answer.small, offset)
        assert np.array_equal(ids, record.ids)
        assert ids.dtype == record.ids.dtype
        assert ids.flags.aligned
        assert not ids.flags.writeable
        assert np.shares_memory(ids, answer.small)
