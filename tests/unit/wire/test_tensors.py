"""Tensors of torch are arrays; torch is not loaded for it."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.errors import RecordError
from serve_app.records import make_record
from serve_app.wire.registry import decode
from tests.unit.wire.samples import FULL, IDS, MODEL, routes, same

REAL = make_record(IDS, num_experts=16)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
)
def test_a_tensor_of_integers_is_an_array(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(IDS).to(dtype)
    same(decode(tensor, FULL), REAL)
    same(decode(tensor, FULL, format="array"), REAL)
    same(decode(tensor.transpose(0, 1).contiguous().transpose(0, 1), FULL), REAL)
    same(decode(torch.nn.Parameter(tensor, requires_grad=False), FULL), REAL)


def test_moe_layers_alone_and_rows_of_minus_one() -> None:
    tensor = torch.from_numpy(routes().ids[:, 1:].astype(np.int32))
    same(decode(tensor, MODEL), routes())
    tensor[1] = -1
    assert decode(tensor, MODEL).valid.tolist() == [True, False, True, True]


def test_sglangs_offline_answer_has_a_tensor_in_its_meta_info() -> None:
    meta_info = {"id": "x", "routed_experts": torch.from_numpy(IDS).int()}
    same(decode(meta_info, FULL), REAL)
    same(decode({**meta_info, "routed_experts": IDS}, FULL), REAL)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (torch.from_numpy(IDS).float(), r"integer ids, got torch.float32\[4, 3, 2\]"),
        (torch.from_numpy(IDS).bfloat16().requires_grad_(), "integer ids, got torch.bfloat16"),
        (torch.from_numpy(IDS) > 3, "integer ids, got torch.bool"),
        (torch.from_numpy(IDS).to(torch.complex64), "integer ids, got torch.complex64"),
        (torch.from_numpy(IDS[0]), r"ids \[rows, 3, 2\], got list\[3, 2\]"),
        (torch.tensor(3), r"ids \[rows, 3, 2\], got list\[\]"),
        (torch.empty(0, 3, 2, dtype=torch.int32), "got no rows"),
        (torch.empty(0), "got no rows"),
        (torch.empty(4, 3, 2, dtype=torch.int32, device="meta"), "tensor that numpy can read"),
        (torch.from_numpy(IDS).to_sparse(), "tensor that numpy can read"),
        ([torch.from_numpy(IDS)], r"a list \[rows\]\[layers\]\[top_k\], got list\[Tensor\]"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_named(payload: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode(payload, FULL)


def test_decoding_loads_no_torch() -> None:
    script = (
        "import sys, numpy as np; from serve_app.wire.registry import decode;"
        "from serve_app.wire.expected import Expected;"
        "assert decode(np.array([[[1, 2]]]), Expected(1, 2, 4)).meta.rows == 1;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
