"""Packed and padded sequences replay as they do one by one."""

import pytest
import torch

from serve_app.errors import ReplayError
from serve_app.replay import replay_routing
from tests.families import PACKABLE, UNPACKABLE, tiny
from tests.unit.replay.passes import TOKENS, random_tokens
from tests.unit.replay.route_batches import batch_of, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")


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
