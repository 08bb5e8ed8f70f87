"""Records: whole, and near to what teacher forcing finds."""

import numpy as np

from serve_app.engines.base import Engine
from serve_app.records import Ids, Record, hash_tokens


def check_rows(record: Record | None, prompt: list[int], output: list[int], engine: Engine) -> None:
    """Assert P+G-1 rows, and the header that goes with them."""
    assert record is not None
    rows = len(prompt) + len(output) - 1
    assert record.ids.shape == (rows, engine.info.layers, engine.info.top_k)
    assert record.ids.dtype == np.uint8
    assert record.start == 0
    assert record.num_experts == engine.info.num_experts
    assert record.moe_layers == engine.info.moe_layers
    assert record.weight_version == engine.weight_version
    assert record.meta.token_hash == hash_tokens((prompt + output)[:rows])
    record.meta.verify(record.ids)


def agreement(record: Record | None, experts: Ids) -> float:
    """Return the share of (row, layer) whose experts are the same set."""
    assert record is not None
    recorded = np.sort(record.ids[:, list(record.moe_layers)], axis=-1)
    assert recorded.shape == experts.shape
    return float((recorded == np.sort(experts, axis=-1)).all(axis=-1).mean())
