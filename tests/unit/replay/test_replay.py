import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from serve_app.engines.moe import MoeShape, find_moe_blocks, moe_shape
from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from serve_app.types import ExpertBatch
from tests.families import COMMON, PACKABLE, REPLAYABLE, UNPACKABLE, UNREPLAYABLE, VOCAB, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 24
REENTRANT = [pytest.param(True, id="reentrant"), pytest.param(False, id="non-reentrant")]


@dataclass
class Pass:
    """What one forward and backward did: logits, every gradient, the ids its experts got."""

    logits: torch.Tensor
    grads: dict[str, torch.Tensor | None]
    ids: torch.Tensor

    def same_bits(self, other: "Pass") -> bool:
        return torch.equal(self.logits, other.logits) and same_grads(self.grads, other.grads)


def same_grads(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None]) -> bool:
    def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        return x is y if x is None or y is None else torch.equal(x, y)

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def random_tokens(count: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def loss_of(logits: torch.Tensor) -> Any:
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def grads_of(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def run(model: Any, tokens: torch.Tensor, **inputs: Any) -> Pass:
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.experts.register_forward_pre_hook(
            lambda _, args, kwargs, block=block: seen.update(
                {block.layer: block.routed_ids(args, kwargs)}
            ),
            with_kwargs=True,
        )
        for block in find_moe_blocks(model)
    ]
    model.zero_grad()
    logits = model(tokens, use_cache=False, **inputs).logits
    loss_of(logits).backward()
    for hook in hooks:
        hook.remove()
    ids = torch.stack([seen[layer] for layer in sorted(seen)], dim=1)
    return Pass(logits.detach(), grads_of(model), ids)


def batch_of(model: Any, ids: torch.Tensor, **changes: Any) -> ExpertBatch:
    """Ids ``[tokens, MoE layers or layers, top_k]`` as one sequence."""
    shape = moe_shape(model)
    batch = ExpertBatch(
        ids=ids,
        valid=torch.ones(len(ids), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        layers=shape.moe_layers,
        num_experts=shape.num_experts,
    )
    return replace(batch, **changes)


def random_ids(model: Any, tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    shape = moe_shape(model)
    scores = torch.rand(
        (tokens, len(shape.moe_layers), shape.num_experts),
        generator=torch.Generator().manual_seed(seed),
    )
    return scores.argsort(dim=-1)[..., : shape.top_k].to(torch.uint8)


def checkpoint_layers(model: Any, *, use_reentrant: bool) -> None:
    # Renamed in transformers 5.2x, where the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


def instance_state(model: Any) -> list[Any]:
    """Everything that a patch or a hook could have left on a module."""
    return [
        (name, dict(vars(module)), dict(module._forward_pre_hooks), dict(module._forward_hooks))
        for name, module in model.named_modules()
    ]


# Families


@pytest.mark.parametrize("family", REPLAYABLE)
def test_own_ids_change_no_bit(family: str) -> None:
    model = tiny(family)
    native = run(model, random_tokens())
    with replay_routing(model, batch_of(model, native.ids.to(torch.uint8))):
        replayed = run(model, random_tokens())
    assert native.same_bits(replayed)


@pytest.mark.parametrize("family", REPLAYABLE)
def test_forced_ids_reach_the_experts_and_gradients_the_router(family: str) -> None:
    model = tiny(family)
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)):
        forced = run(model, random_tokens())
    assert torch.equal(forced.ids, ids.long())
    for block in find_moe_blocks(model):
        grads = [p.grad for p in block.router.parameters() if p.grad is not None]
        assert any(bool(grad.abs().sum() > 0) for grad in grads)
        assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("family", REPLAYABLE)
def test_invalid_rows_route_natively(family: str) -> None:
    model = tiny(family)
    native = run(model, random_tokens())
    garbage = torch.full_like(native.ids, 255).to(torch.uint8)
    nothing_valid = torch.zeros(TOKENS, dtype=torch.bool)
    with replay_routing(model, batch_of(model, garbage, valid=nothing_valid)):
        replayed = run(model, random_tokens())
    assert native.same_bits(replayed)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_valid_and_invalid_rows_side_by_side(family: str) -> None:
    model = tiny(family, num_hidden_layers=2)
    native = run(model, random_tokens())
    ids = random_ids(model)
    valid = torch.arange(TOKENS) % 3 != 0
    ids[~valid] = 255
    with replay_routing(model, batch_of(model, ids, valid=valid)):
        replayed = run(model, random_tokens())
    assert torch.equal(replayed.ids[valid], ids[valid].long())
    # What the first sparse layer is given does not depend on the forced rows yet.
    assert torch.equal(replayed.ids[~valid, 0], native.ids[~valid, 0])


@pytest.mark.parametrize("family", REPLAYABLE)
def test_ids_of_another_family_are_refused(family: str) -> None:
    """Qwen3-MoE has 8 experts in all 3 layers, DeepSeek-V3 in the last 2, LongCat 10 in 4."""

    def fits(one: MoeShape) -> tuple[object, ...]:
        return one.num_experts, one.moe_layers, one.top_k

    model = tiny(family)
    own = moe_shape(model)
    others = [tiny(name) for name in ("qwen3_moe", "deepseek_v3", "longcat_flash")]
    others = [other for other in others if fits(moe_shape(other)) != fits(own)]
    assert len(others) >= 2
    for other in others:
        batch = batch_of(other, random_ids(other))
        with (
            pytest.raises(ReplayError, match=rf"{own.family} has .*, the batch "),
            replay_routing(model, batch),
        ):
            model(random_tokens(), use_cache=False)


@pytest.mark.parametrize("family", UNREPLAYABLE)
def test_families_that_replay_would_falsify_are_refused(family: str) -> None:
    model = tiny(family)
    batch = batch_of(model, random_ids(model))
    with (
        pytest.raises(ReplayError, match=f"{family}: routes cannot be replayed"),
        replay_routing(model, batch),
    ):
        pass


def test_what_cannot_be_recorded_is_refused_for_replay_too() -> None:
    qwen = tiny("qwen3_moe")
    batch = batch_of(qwen, random_ids(qwen))
    with (
        pytest.raises(ReplayError, match="llama4_text: routed experts cannot be recorded"),
        replay_routing(tiny("llama4_text"), batch),
    ):
        pass
    dense = Qwen3ForCausalLM(Qwen3Config(**COMMON))
    with pytest.raises(ReplayError, match="qwen3 has no MoE layers"), replay_routing(dense, batch):
        pass


# Values


@pytest.mark.parametrize("normalised", [True, False])
def test_qwen3_moe_block_by_hand(normalised: bool) -> None:
    model = tiny("qwen3_moe", norm_topk_prob=normalised)
    block = model.model.layers[1].mlp
    seen: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)), torch.no_grad():
        model(random_tokens(), use_cache=False)
    hook.remove()
    hidden, output = (tensor.view(TOKENS, -1) for tensor in seen)

    with torch.no_grad():
        chosen = ids[:, 1].long()
        gates = (hidden @ block.gate.weight.T).softmax(-1).gather(-1, chosen)
        if normalised:
            gates = gates / gates.sum(-1, keepdim=True)
        gate_up = torch.einsum("th,tkfh->tkf", hidden, block.experts.gate_up_proj[chosen])
        gate, up = gate_up.chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        by_expert = torch.einsum("tkf,tkhf->tkh", inner, block.experts.down_proj[chosen])
        expected = (gates[..., None] * by_expert).sum(1)
    torch.testing.assert_close(output, expected)


def _softmax(logits: torch.Tensor, ids: torch.Tensor, _: Any) -> torch.Tensor:
    return logits.softmax(-1).gather(-1, ids)


def _softmax_normalised(logits: torch.Tensor, ids: torch.Tensor, router: Any) -> torch.Tensor:
    weights = _softmax(logits, ids, router)
    normalised: torch.Tensor = weights / weights.sum(-1, keepdim=True)
    return normalised


def _softmax_of_the_chosen(logits: torch.Tensor, ids: torch.Tensor, router: Any) -> torch.Tensor:
    weights: torch.Tensor = (logits + router.bias).gather(-1, ids).softmax(-1)
    return weights


def _sigmoid_normalised_scaled(
    logits: torch.Tensor, ids: torch.Tensor, router: Any
) -> torch.Tensor:
    """Without the bias that the router chooses by."""
    weights = logits.sigmoid().gather(-1, ids)
    scaled: torch.Tensor = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
    return scaled


@pytest.mark.parametrize(
    ("family", "formula"),
    [
        ("mixtral", _softmax_normalised),
        ("olmoe", _softmax),
        ("deepseek_v2", _softmax),
        ("deepseek_v3", _sigmoid_normalised_scaled),
        ("glm4_moe", _sigmoid_normalised_scaled),
        ("gpt_oss", _softmax_of_the_chosen),
    ],
)
def test_gate_weights_by_hand_and_no_group_limit_hides_a_forced_expert(
    family: str, formula: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
) -> None:
    model = tiny(family)
    router = next(block.router for block in find_moe_blocks(model) if block.layer == 2)
    for name, buffer in router.named_buffers():
        assert name == "e_score_correction_bias"
        buffer.copy_(torch.linspace(-2, 2, 8))
    seen: list[Any] = []
    hook = router.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)), torch.no_grad():
        model(random_tokens(), use_cache=False)
    hook.remove()
    hidden, (_, weights, _) = seen
    with torch.no_grad():
        logits = hidden.view(TOKENS, -1) @ router.weight.T
        expected = formula(logits, ids[:, -1].long(), router)
    torch.testing.assert_close(weights, expected)
    assert bool((weights > 0).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_every_id_dtype_replays_alike(dtype: torch.dtype) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)):
        expected = run(model, random_tokens())
    with replay_routing(model, batch_of(model, ids.to(dtype))):
        assert run(model, random_tokens()).same_bits(expected)


def test_more_than_256_experts() -> None:
    model = tiny("qwen3_moe", num_experts=300)
    native = run(model, random_tokens())
    assert int(native.ids.max()) > 255
    with replay_routing(model, batch_of(model, native.ids.to(torch.uint16))):
        assert run(model, random_tokens()).same_bits(native)


def test_dense_layers_between() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0, 3])
    ids = random_ids(model)
    with replay_routing(model, batch_of(model, ids)):
        moe_only = run(model, random_tokens())
    assert torch.equal(moe_only.ids, ids.long())
    all_layers = torch.full((TOKENS, 5, 2), 255, dtype=torch.uint8)
    all_layers[:, [1, 2, 4]] = ids
    with replay_routing(model, batch_of(model, all_layers)):
        assert run(model, random_tokens()).same_bits(moe_only)


def test_routing_matters() -> None:
    model = tiny("qwen3_moe")
    native = run(model, random_tokens())
    with replay_routing(model, batch_of(model, random_ids(model))):
        forced = run(model, random_tokens())
    assert float((native.logits - forced.logits).abs().max()) > 0.1


# Layouts


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"position_ids": positions[None]}


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_equals_one_by_one(family: str) -> None:
    model = tiny(family)
    tokens, ids = random_tokens(), random_ids(model)
    whole = batch_of(model, ids, cu_seqlens=torch.tensor([0, 10, TOKENS], dtype=torch.int32))
    with replay_routing(model, whole), torch.no_grad():
        together = model(tokens, use_cache=False, **packed(10, 14)).logits
    for rows in (slice(0, 10), slice(10, TOKENS)):
        with replay_routing(model, batch_of(model, ids[rows])), torch.no_grad():
            alone = model(tokens[:, rows], use_cache=False).logits
        torch.testing.assert_close(together[:, rows], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", UNPACKABLE)
def test_families_whose_packed_rows_leak_are_refused(family: str) -> None:
    model = tiny(family)
    two = batch_of(
        model, random_ids(model), cu_seqlens=torch.tensor([0, 10, TOKENS], dtype=torch.int32)
    )
    message = f"{family} cannot keep packed sequences apart .*expected 2 .*found 1 rows"
    with pytest.raises(ReplayError, match=message), replay_routing(model, two):
        model(random_tokens(), use_cache=False, **packed(10, 14))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_padded_equals_one_by_one(family: str) -> None:
    model = tiny(family)
    tokens, ids = random_tokens().view(2, 12), random_ids(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    batch = batch_of(model, ids, valid=mask.bool().flatten(), cu_seqlens=torch.tensor([0, 12, 24]))
    with replay_routing(model, batch), torch.no_grad():
        together = model(tokens, attention_mask=mask, use_cache=False).logits
    for row, length in ((0, 8), (1, 12)):
        alone_ids = ids.view(2, 12, *ids.shape[1:])[row, :length]
        with replay_routing(model, batch_of(model, alone_ids)), torch.no_grad():
            alone = model(tokens[row : row + 1, :length], use_cache=False).logits
        torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-4)


def test_gpt_oss_packs_with_block_diagonal_masks_of_its_own() -> None:
    model = tiny("gpt_oss")
    tokens, ids = random_tokens(), random_ids(model)
    sequence = torch.arange(TOKENS) >= 10
    same = (sequence[:, None] == sequence) & torch.ones(TOKENS, TOKENS).tril().bool()
    mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)[None, None]
    masks = {"full_attention": mask, "sliding_attention": mask}
    two = batch_of(model, ids, cu_seqlens=torch.tensor([0, 10, TOKENS], dtype=torch.int32))
    with replay_routing(model, two), torch.no_grad():
        together = model(tokens, attention_mask=masks, use_cache=False, **packed(10, 14)).logits
    with replay_routing(model, batch_of(model, ids[10:])), torch.no_grad():
        alone = model(tokens[:, 10:], use_cache=False).logits
    torch.testing.assert_close(together[:, 10:], alone, atol=1e-5, rtol=1e-4)


# Memory


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


# Gradient checkpointing


def replayed_grads(model: Any, ids: torch.Tensor, *, inside: bool) -> Pass:
    model.zero_grad()
    with replay_routing(model, batch_of(model, ids)):
        logits = model(random_tokens(), use_cache=False).logits
        if inside:
            loss_of(logits).backward()
    if not inside:
        loss_of(logits).backward()
    return Pass(logits.detach(), grads_of(model), ids)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text", "deepseek_v2", "longcat_flash"])
def test_checkpointing_changes_no_bit(family: str, use_reentrant: bool, inside: bool) -> None:
    model = tiny(family)
    ids = random_ids(model)
    plain = replayed_grads(model, ids, inside=inside)
    checkpoint_layers(model, use_reentrant=use_reentrant)
    before = instance_state(model)
    assert plain.same_bits(replayed_grads(model, ids, inside=inside))
    assert instance_state(model) == before


@pytest.mark.parametrize("implementation", CheckpointImpl)
def test_checkpoint_wrapper_changes_no_bit(implementation: CheckpointImpl) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = replayed_grads(model, ids, inside=False)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, Qwen3MoeDecoderLayer),
    )
    wrapped = replayed_grads(model, ids, inside=False)
    wrapped.grads = {
        name.replace("_checkpoint_wrapped_module.", ""): grad
        for name, grad in wrapped.grads.items()
    }
    assert plain.same_bits(wrapped)


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_each_backward_replays_the_routes_of_its_own_forward(use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    first, second = random_ids(model, seed=1), random_ids(model, seed=2)

    def sum_of_both() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        with replay_routing(model, batch_of(model, first)):
            one = model(random_tokens(), use_cache=False).logits
        with replay_routing(model, batch_of(model, second)):
            two = model(random_tokens(), use_cache=False).logits
            loss_of(one).backward()
        native = model(random_tokens(), use_cache=False).logits
        loss_of(two).backward()
        loss_of(native).backward()
        return grads_of(model)

    plain = sum_of_both()
    checkpoint_layers(model, use_reentrant=use_reentrant)
    assert same_grads(plain, sum_of_both())


@pytest.mark.parametrize("use_reentrant", REENTRANT)
def test_backward_in_another_thread_and_twice(use_reentrant: bool) -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    plain = replayed_grads(model, ids, inside=True)
    checkpoint_layers(model, use_reentrant=use_reentrant)
    before = instance_state(model)
    with replay_routing(model, batch_of(model, ids)):
        loss = loss_of(model(random_tokens(), use_cache=False).logits)
    for _ in range(2):
        model.zero_grad()
        thread = threading.Thread(target=lambda: loss.backward(retain_graph=True))
        thread.start()
        thread.join()
        assert same_grads(plain.grads, grads_of(model))
    assert instance_state(model) == before


# Refusals


def test_rows_must_match_the_forward() -> None:
    model = tiny("qwen3_moe")
    batch = batch_of(model, random_ids(model, tokens=23))
    message = "layer 0: the batch has routes for 23 token rows, the forward pass has 24"
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch):
        model(random_tokens(), use_cache=False)


def test_a_valid_row_holds_no_expert_twice() -> None:
    model = tiny("qwen3_moe")
    ids = random_ids(model)
    ids[5, 1] = 3
    message = r"layer 1, row 5: expected 2 different expert ids in \[0, 8\), got \[3, 3\]"
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch_of(model, ids)):
        pass


@pytest.mark.parametrize("wrong", [8, -1])
def test_ids_are_in_range(wrong: int) -> None:
    model = tiny("deepseek_v3")
    ids = random_ids(model).to(torch.int32)
    ids[7, 0, 1] = wrong
    message = rf"layer 1, row 7: expected 2 .* in \[0, 8\), got \[\d, {wrong}\]"
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch_of(model, ids)):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 16}, "qwen3_moe has 8 experts, the batch 16"),
        ({"layers": (0, 1)}, r"has MoE layers \(0, 2\), the batch \(0, 1\)"),
        ({"ids": torch.zeros(24, 4, 2, dtype=torch.uint8)}, r"3 layers \(all\) or 2 .* got 4"),
        ({"ids": torch.zeros(24, 2, 3, dtype=torch.uint8)}, "has top-k 2, the batch 3"),
        ({"ids": torch.zeros(24, 4, dtype=torch.uint8)}, r"must be \[tokens, layers, top_k\]"),
        ({"ids": torch.zeros(24, 2, 2, dtype=torch.int16)}, r"int64, got torch\.int16"),
        ({"valid": torch.ones(23, dtype=torch.bool)}, r"valid must be bool \[24\], got .*\[23\]"),
        ({"valid": torch.ones(24)}, r"valid must be bool \[24\], got torch\.float32 \[24\]"),
    ],
)
def test_a_batch_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny("qwen3_moe", mlp_only_layers=[1])
    batch = replace(batch_of(model, random_ids(model)), **changes)
    with pytest.raises(ReplayError, match=message), replay_routing(model, batch):
        pass


def test_one_context_serves_one_forward() -> None:
    model = tiny("qwen3_moe")
    with replay_routing(model, batch_of(model, random_ids(model))):
        model(random_tokens(), use_cache=False)
        with pytest.raises(ReplayError, match="layer 0 used its routes already"):
            model(random_tokens(), use_cache=False)


def test_contexts_do_not_nest() -> None:
    model = tiny("qwen3_moe")
    batch = batch_of(model, random_ids(model))
    with replay_routing(model, batch):
        with (
            pytest.raises(ReplayError, match="does not nest"),
            replay_routing(model, batch),
        ):
            pass
        model(random_tokens(), use_cache=False)


def test_contexts_of_two_models_do_not_meet() -> None:
    one, two = tiny("qwen3_moe"), tiny("qwen3_moe", seed=1)
    ids = random_ids(one)
    with replay_routing(one, batch_of(one, ids)), replay_routing(two, batch_of(two, ids)):
        assert torch.equal(run(one, random_tokens()).ids, ids.long())
        assert torch.equal(run(two, random_tokens()).ids, ids.long())


def test_layers_that_used_no_routes_are_named() -> None:
    model = tiny("qwen3_moe")
    with (
        pytest.raises(ReplayError, match=r"expected all 3 .* layers \[1, 2\] did not"),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        model.model.layers[0].mlp(torch.zeros(1, TOKENS, 32))


def test_an_exception_in_flight_is_not_masked() -> None:
    model = tiny("qwen3_moe")
    before = instance_state(model)
    with (
        pytest.raises(KeyError, match="loss"),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        raise KeyError("loss")
    assert instance_state(model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "dbrx", "gemma4_text"])
def test_the_model_is_as_it_was(family: str, checkpointing: bool) -> None:
    model = tiny(family)
    if checkpointing:
        checkpoint_layers(model, use_reentrant=False)
    native = run(model, random_tokens())
    before = instance_state(model)
    with replay_routing(model, batch_of(model, random_ids(model))):
        assert instance_state(model) != before
        model(random_tokens(), use_cache=False)
    assert instance_state(model) == before
    with (
        pytest.raises(ReplayError, match="24 token rows, the forward pass has 12"),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        model(random_tokens(12), use_cache=False)
    assert instance_state(model) == before
    assert run(model, random_tokens()).same_bits(native)


def test_a_router_that_takes_no_top_k_is_noticed() -> None:
    model = tiny("qwen3_moe")
    gate = model.model.layers[1].mlp.gate

    def sort_instead(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden @ gate.weight.T
        values, ids = logits.sort(dim=-1, descending=True)
        return logits, values[:, :2], ids[:, :2]

    gate.forward = sort_instead
    message = "router of layer 1 was expected to take a top-2 over 8 experts, and did not"
    with (
        pytest.raises(ReplayError, match=message),
        replay_routing(model, batch_of(model, random_ids(model))),
    ):
        model(random_tokens(), use_cache=False)
    assert gate.forward is sort_instead
