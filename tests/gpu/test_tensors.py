"""Payloads that are tensors on a device are brought to the CPU."""

import pytest
import torch

from serve_app.wire.expected import Expected
from serve_app.wire.registry import decode
from tests.unit.wire.samples import IDS, same
from tests.unit.wire.test_tensors import REAL

pytestmark = pytest.mark.gpu


def test_a_tensor_on_a_device_is_brought_to_the_cpu() -> None:
    same(decode(torch.from_numpy(IDS).int().cuda(), Expected(3, 2, 16, rows=4)), REAL)
