"""NeMo-RL: ``nrlre1:<dtype>:<rows>x<layers>x<top_k>:<base64>``; a row of -1 routes natively.

Source: NVIDIA-NeMo/RL ``nemo_rl/utils/routed_experts_codec.py`` (PR 3292), read by NeMo-Gym too;
``[tokens, num_moe_layers, topk]``; int8 up to 128 experts, int16 up to 32,768, then int32 (PR
3113). A row that is negative in part is damaged there as well.

An envelope has a row for each of P+G tokens, and its readers count on it. The last token was
sampled and never processed: its row is a dummy, 0 .. top_k-1 in every layer
(``pad_and_align_routed_expert_indices`` in ``nemo_rl/models/generation/vllm/utils.py``), which
NeMo-Gym replaces in the next turn by the one of that turn's prompt (PR 3485). So the dummy is no
row of the record, and ``Expected.rows`` does not count it: a last row like that is cut. Where the
rows are known and one more comes, the last is also cut if it is all -1 or 0, other backends'
filling, and refused if it is a choice. With ``extra_rows`` the caller has counted the dummy, and
nothing else is cut.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record
from serve_app.wire.payloads.base64_ids import read_ids, write_ids
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.fields import read_dtype, read_shape
from serve_app.wire.payloads.refusal import refusal

_MAGIC = "nrlre1:"
_DTYPES = ("int8", "int16", "int32")
_HEADER = re.compile(r"nrlre1:([a-z0-9]{1,8}):([0-9]{1,18})x([0-9]{1,18})x([0-9]{1,18}):")


def matches(payload: object) -> bool:
    """Tell a text that begins with nrlre1."""
    return isinstance(payload, str) and payload.startswith(_MAGIC)


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of an envelope without its dummy; rows of -1 are invalid."""
    header = _HEADER.match(payload) if isinstance(payload, str) else None
    if not isinstance(payload, str) or header is None:
        raise refusal("nrlre1:<dtype>:<rows>x<layers>x<top_k>:<base64>", payload)
    dtype = read_dtype(header[1], _DTYPES)
    shape = read_shape([int(size) for size in header.groups()[1:]])
    expected.check_shape(shape, spare=1)
    ids = read_ids(payload[header.end() :], dtype, shape)
    return expected.to_record(ids if expected.extra_rows else _without_dummy(ids, expected.rows))


def encode(record: Record) -> str:
    """Return the envelope of the MoE layers, with the dummy; invalid rows are -1."""
    experts = record.num_experts
    dtype = "int8" if experts <= 128 else "int16" if experts <= 2**15 else "int32"
    rows, layers, top_k = record.meta.rows, len(record.moe_layers), record.meta.top_k
    ids = np.empty((rows + 1, layers, top_k), dtype)
    ids[:rows] = record.ids[:, list(record.moe_layers)]
    ids[:rows][~record.valid] = -1
    ids[rows] = np.arange(top_k)
    return f"{_MAGIC}{dtype}:{'x'.join(map(str, ids.shape))}:{write_ids(ids, dtype)}"


def _without_dummy(ids: npt.NDArray[Any], rows: int | None) -> npt.NDArray[Any]:
    last = ids[-1]
    dummy = bool((last == np.arange(last.shape[-1])).all())
    blank = rows == len(ids) - 1 and any((last == filling).all() for filling in (-1, 0))
    if dummy and len(ids) == 1:
        raise RecordError("expected routes, got no rows: nothing but NeMo-RL's dummy")
    cut = ids[:-1] if dummy or blank else ids
    if rows not in (None, len(cut)):
        raise RecordError(
            f"expected {rows} rows and after them NeMo-RL's dummy, which is none, got {len(cut)}"
            f" rows and {'the' if dummy else 'no'} dummy"
        )
    return cut
