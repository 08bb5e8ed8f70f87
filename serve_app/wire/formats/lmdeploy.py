"""LMDeploy: nested lists ``[rows][layers][top_k]``, as its HTTP answers carry them.

Source: answers of LMDeploy 0.18.0 (``routed_experts`` of ``meta_info`` and of choices): uint16 as
a list, all hidden layers, 65535 (GLM) or 0 (Kimi-K2) in dense ones. SkyRL's
``/skyrl/v1/generate`` before its PR 1909 and NeMo-RL before its PR 3292 send the same, the latter
with its dummy in the last row, which nothing tells here: ``extra_rows=1`` cuts it.
"""

from itertools import chain
from typing import Any

import numpy as np

from serve_app.errors import RecordError
from serve_app.records import Record
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.refusal import refusal
from serve_app.wire.payloads.whole_rows import whole_rows


def matches(payload: object) -> bool:
    """Tell a list."""
    return isinstance(payload, list)


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of nested lists ``[rows][layers or MoE layers][top_k]``.

    Every level is checked before numpy sees it: numpy widens mixed values without bound, reads
    digits in strings, and cuts floats.
    """
    if not isinstance(payload, list) or not payload or type(payload[0]) is not list:
        raise refusal("a list [rows][layers][top_k]", payload)
    shape = (len(payload), len(payload[0]), expected.top_k)
    expected.check_shape(shape)
    _check_lists(payload, shape[1], "layers")
    cells = list(chain.from_iterable(payload))
    _check_lists(cells, shape[2], "top_k")
    values = list(chain.from_iterable(cells))
    if odd := set(map(type, values)) - {int}:
        raise RecordError(f"expected expert ids as integers, got {min(t.__name__ for t in odd)}")
    try:
        ids = np.fromiter(values, np.int32, len(values))
    except OverflowError:
        raise RecordError(
            f"expected expert ids in [0, {expected.num_experts}), got one beyond 32 bits"
        ) from None
    return expected.to_record(ids.reshape(shape))


def encode(record: Record) -> list[Any]:
    """Return nested lists ``[rows][layers][top_k]``."""
    nested: list[Any] = whole_rows(record, "a nested list").tolist()
    return nested


def _check_lists(found: list[Any], length: int, name: str) -> None:
    if odd := set(map(type, found)) - {list}:
        raise RecordError(
            f"expected lists of {length} ({name}), got {min(t.__name__ for t in odd)}"
        )
    if odd_sizes := set(map(len, found)) - {length}:
        raise RecordError(f"expected lists of {length} ({name}), got one of {min(odd_sizes)}")
