"""Replay holds what a forward pass holds without it."""

from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from serve_app.replay import replay_routing
from tests.families import tiny
from tests.unit.replay.passes import random_tokens
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes of tensors that ``work`` still holds when it returns, and at most held."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    assert changes
    held = list(accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
    del kept
    return held[-1], max(held)


def test_ids_stay_at_native_width_and_widen_one_layer_at_a_time() -> None:
    """What a trainer holds in a forward pass with replay is what it holds without, to the byte.

    An int64 copy of all ids would be the size of 12 layers; beyond the ids that any router's
    top-k keeps for backward there is room for the check of one layer only, before the pass.
    """
    tokens, layers, top_k = 512, 12, 4
    model = tiny("qwen3_moe", num_hidden_layers=layers, num_experts_per_tok=top_k)
    batch = batch_of(model, random_ids(model, tokens))
    assert batch.ids.nbytes == tokens * layers * top_k
    one_layer_widened = tokens * top_k * 8
    model(random_tokens(tokens), use_cache=False)  # what is made once is nobody's

    def native() -> torch.Tensor:
        logits: torch.Tensor = model(random_tokens(tokens), use_cache=False).logits
        return logits

    def replayed() -> torch.Tensor:
        with replay_routing(model, batch):
            return native()

    def opened() -> None:
        with suppress(KeyError), replay_routing(model, batch):
            raise KeyError("before any forward pass")

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert allocated(replayed) == allocated(native)
    left, most = allocated(opened)
    assert left == 0
    assert most < 4 * one_layer_widened < layers * one_layer_widened
