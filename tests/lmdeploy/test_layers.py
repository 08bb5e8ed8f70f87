"""The ids of all layers are written at once, and the buffer has what it would have had."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, LAYERS, TOP_K = 5, 6, 2


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would be a kernel each on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func.overloadpacket.__name__ in ("copy_", "stack", "cat")
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    def __init__(self, layer: int, dense: bool) -> None:
        super().__init__()
        self.layer, self.dense = layer, dense

    def forward(self, ids: torch.Tensor, all_routed_experts: Any = None) -> torch.Tensor:
        if all_routed_experts is not None:
            if self.dense:
                all_routed_experts[:, self.layer].zero_()
            else:
                all_routed_experts[:, self.layer, :] = ids + self.layer
        return ids


class Decoder(nn.Module):
    def __init__(self, dense: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(n, n in dense) for n in range(LAYERS))

    def forward(self, ids: torch.Tensor, all_routed_experts: Any = None) -> torch.Tensor:
        for layer in self.layers:
            ids = layer(ids, all_routed_experts=all_routed_experts)
        return ids


class Model(nn.Module):
    def __init__(self, dense: tuple[int, ...] = (), called: bool = True) -> None:
        super().__init__()
        self.model = Decoder(dense)
        self.called = called

    def forward(self, ids: torch.Tensor, records: bool = True) -> torch.Tensor | None:
        buffer = torch.full((TOKENS, LAYERS, TOP_K), 65535, dtype=torch.uint16)
        run = self.model if self.called else self.model.forward
        run(ids, all_routed_experts=buffer if records else None)
        return buffer if records else None


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    from serve_app.engines.lmdeploy.patching import layers

    step = SimpleNamespace(is_decoding=True)
    manager = SimpleNamespace(current_context=lambda: step)
    monkeypatch.setattr(layers, "get_step_ctx_manager", lambda: manager)
    return step


@pytest.mark.parametrize("dense", [(), (0, 1), (2,), (1, 3, 5), (5,), tuple(range(LAYERS))])
@pytest.mark.parametrize("called", [True, False])
def test_the_buffer_is_the_same(
    decoding: SimpleNamespace, dense: tuple[int, ...], called: bool
) -> None:
    from serve_app.engines.lmdeploy.patching.layers import gather

    ids = torch.randint(0, 300, (TOKENS, TOP_K))
    model = Model(dense, called)
    wanted = model(ids)
    assert gather(model)
    assert torch.equal(model(ids), wanted)
    assert model(ids, records=False) is None


def test_a_decode_step_writes_once_and_a_prefill_as_before(decoding: SimpleNamespace) -> None:
    from serve_app.engines.lmdeploy.patching.layers import gather

    model = Model()
    assert gather(model)
    ids = torch.randint(0, 300, (TOKENS, TOP_K))
    found = {}
    for decoding.is_decoding in (True, False):
        with Copies() as copies:
            model(ids)
        found[decoding.is_decoding] = copies.found
    assert found == {True: 2, False: LAYERS}


def test_a_model_whose_layers_are_called_in_other_ways_is_left_alone() -> None:
    from serve_app.engines.lmdeploy.patching.layers import gather

    layers = nn.Sequential(Layer(0, False), Layer(1, False))
    before = [layer.forward for layer in layers]
    assert not gather(layers)
    assert [layer.forward for layer in layers] == before


def test_routes_are_queued_behind_their_step_and_nothing_else_is() -> None:
    from serve_app.engines.lmdeploy.patching.adapting import adapt_agent

    class OnGpu:
        def to(self, *where: Any, **how: Any) -> Any:
            return where, how

    pushed: list[Any] = []
    agent: Any = SimpleNamespace(get_logits=lambda hidden: hidden, _push_output=pushed.append)
    adapt_agent(agent)
    tokens = OnGpu()
    for routes in (OnGpu(), None):
        agent._push_output(SimpleNamespace(all_routed_experts=routes, next_token_ids=tokens))
    assert [output.all_routed_experts for output in pushed] == [
        (("cpu",), {"non_blocking": True}),
        None,
    ]
    assert all(output.next_token_ids is tokens for output in pushed)
