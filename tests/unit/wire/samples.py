"""Records, ids and payloads of one small model, and when two records are the same."""

import base64
import io
from typing import Any

import numpy as np

from serve_app.records import Record, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FORMATS, FormatName
from tests.distinct_ids import distinct_ids

NAMES: list[FormatName] = list(FORMATS)
SAY_START: tuple[FormatName, ...] = ("r3serve", "prime_rl", "sglang_tagged")
MODEL = Expected(layers=3, top_k=2, num_experts=16, moe_layers=(1, 2))
FULL = Expected(3, 2, 16)
IDS = np.arange(24, dtype=np.uint8).reshape(4, 3, 2) % 16


def routes(rows: int = 4, **how: Any) -> Record:
    ids = distinct_ids((rows, 3, 2), 16, seed=rows)
    return make_record(ids, num_experts=16, moe_layers=(1, 2), **how)


def same(found: Record, wanted: Record) -> None:
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.valid, wanted.valid)
    assert found.ids.dtype == wanted.ids.dtype
    assert found.moe_layers == wanted.moe_layers
    assert (found.start, found.num_experts) == (wanted.start, wanted.num_experts)
    found.meta.verify(found.ids)


def npy(ids: Any, **how: Any) -> str:
    file = io.BytesIO()
    np.save(file, ids, **how)
    return base64.b64encode(file.getvalue()).decode()
