"""An array ``[rows, layers, top_k]``, or ``[rows, MoE layers, top_k]``, of any integers.

Sources: the value of LMDeploy's ``shared_store`` (uint16, all layers); MoE-layers-only arrays as
NeMo-RL describes them (``[tokens, num_moe_layers, topk]``); vLLM's ``CompletionOutput`` (numpy) and
SGLang's offline engine (``torch.Tensor``, on any device).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.records import Record
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.refusal import refusal
from serve_app.wire.payloads.tensors import is_tensor, on_cpu
from serve_app.wire.payloads.whole_rows import whole_rows


def matches(payload: object) -> bool:
    """Tell an array of numpy or torch."""
    return isinstance(payload, np.ndarray) or is_tensor(payload)


def decode(payload: object, expected: Expected) -> Record:
    """Return the record of an array; MoE layers alone go to their global columns."""
    return expected.to_record(ids_of(payload))


def ids_of(payload: object) -> npt.NDArray[Any]:
    """Return the array itself, a tensor's as one of numpy that shares its memory if it can."""
    if isinstance(payload, np.ndarray):
        return payload
    if is_tensor(payload):
        return on_cpu(payload)
    raise refusal("an array [rows, layers, top_k]", payload)


def encode(record: Record) -> npt.NDArray[Any]:
    """Return the ids of the MoE layers alone, ``[rows, MoE layers, top_k]``."""
    return whole_rows(record, "an array")[:, list(record.moe_layers)]
