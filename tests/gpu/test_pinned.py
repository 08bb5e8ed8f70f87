"""Page-locked batches: the copy to the device is asynchronous and right."""

from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import StoreArgs
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.owner.memory import MemoryStore
from serve_app.tensors import pinned, tensor_over
from serve_app.types import BatchSpec, RoutedSequence
from tests.distinct_ids import distinct_ids

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [None, "int32", "int64"])
@pytest.mark.parametrize("experts", [256, 257])
def test_a_pinned_batch_is_copied_to_the_device_asynchronously(dtype: Any, experts: int) -> None:
    store = MemoryStore("pinned", StoreArgs(backend="memory"))
    ids = distinct_ids((4096, 48, 8), experts)
    key = store.put(make_record(ids, num_experts=experts))
    for _ in range(3):  # freed blocks are handed out again
        spec = BatchSpec(dtype=dtype)
        batch = tensor_over(
            materialize(store, [RoutedSequence(key, 4096)], spec, allocate=pinned).ids
        )
        assert batch.is_pinned()
        there = batch.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        np.testing.assert_array_equal(there.cpu().numpy(), ids)
        del batch, there
