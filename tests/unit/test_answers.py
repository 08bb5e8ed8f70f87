"""A read's answer brings every header and every place back."""

import numpy as np

from serve_app.errors import KeyReleased
from serve_app.records import make_record, raw_record
from serve_app.store.answers import Collected


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
    chain, missed, *others = collected.answer().found
    assert chain == [(metas[0], b"first"), (metas[1], b"second")]
    assert isinstance(missed, KeyReleased)
    assert others == [[(meta, b"alone")] for meta in metas[2:]]
