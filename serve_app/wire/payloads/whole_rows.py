"""Records for formats that have no way to say that a row routes natively."""

from typing import Any

import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record


def whole_rows(record: Record, reader: str) -> npt.NDArray[Any]:
    """Return the ids ``[rows, layers, top_k]`` of a record whose rows are all valid.

    Raises `RecordError` otherwise: the reader would take the row for expert 0. And for an array
    whose experts nobody named.
    """
    _ = record.num_experts
    if record.meta.invalid:
        raise RecordError(
            f"expected valid rows, {reader} cannot say that row {record.meta.invalid[0]} must"
            " route natively"
        )
    return record.ids
