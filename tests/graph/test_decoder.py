"""The decoder in Serve's local testing mode: the same batches as here, and none without bound."""

from collections.abc import Iterator

import pytest
import torch
from ray import serve

from examples.recipes.samples import Model, Sample, put_samples
from graphs.store import build
from serve_app import RankSlice, RoutedExpertsClient, RoutedSequence
from serve_app.client.served import Handles
from serve_app.config import StoreGraphArgs

MOST = 1 << 20


@pytest.fixture
def client() -> Iterator[RoutedExpertsClient]:
    args = {"store": {"backend": "memory"}, "decoder": {"max_answer_bytes": MOST}}
    app = build(StoreGraphArgs.model_validate(args))
    handle = serve.run(app, name="local", route_prefix=None, _local_testing_mode=True)
    client = RoutedExpertsClient("local", handles=Handles(None, handle, "local"))
    yield client
    client.release(tag="decoder")


def sequences(samples: list[Sample]) -> list[RoutedSequence]:
    return [RoutedSequence(sample.key, sample.tokens) for sample in samples]


def test_the_decoder_answers_what_is_read_here(client: RoutedExpertsClient) -> None:
    asked = sequences(put_samples(client, Model(), (90, 41, 60), "decoder"))
    rank = RankSlice(4, total_multiple=64, cp_size=2, cp_rank=1, layers=(5, 2))
    for dtype in (None, "int64"):
        here, there = (
            client.materialize(asked, rank=rank, dtype=dtype, pad="random", where=where)
            for where in ("local", "decoder")
        )
        assert there.ids.dtype == here.ids.dtype
        for field in ("ids", "valid", "cu_seqlens"):
            assert torch.equal(getattr(there, field), getattr(here, field))
        assert (there.columns, there.layers, there.missing) == (here.columns, here.layers, ())
        out = torch.empty_like(here.ids)
        kept = client.materialize(
            asked,
            rank=rank,
            dtype=dtype,
            pad="random",
            where="decoder",
            out=out,
        )
        assert kept.ids is out
        assert torch.equal(out, here.ids)


def test_an_answer_without_bound_is_refused_before_it_is_allocated(
    client: RoutedExpertsClient,
) -> None:
    asked = sequences(put_samples(client, Model(), (90,), "decoder"))
    for rank in (RankSlice(total_multiple=1 << 17), RankSlice(total_multiple=1 << 40)):
        with pytest.raises(ValueError, match=rf"an answer of up to {MOST} bytes, got uint8"):
            client.materialize(asked, rank=rank, where="decoder")
