"""The composed graph in Serve's local testing mode: no Ray, everything else real."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from graphs.rollout import build
from serve_app import GenerateRequest, RoutedExpertsClient, RoutedSequence
from serve_app.config import RolloutArgs
from serve_app.errors import InvalidRequest, KeyReleased, WeightsMismatch


def serve_locally(model: Path, **engine: Any) -> RoutedExpertsClient:
    args = RolloutArgs.model_validate(
        {
            "engine": {"model": str(model), "dtype": "float32", **engine},
            "store": {"backend": "memory"},
        }
    )
    edge = serve.run(build(args), name="local", _local_testing_mode=True)
    return RoutedExpertsClient("local", handles=edge.handles.remote().result(timeout_s=30))


@pytest.fixture(scope="module")
def client(tiny_checkpoint: Path) -> RoutedExpertsClient:
    return serve_locally(
        tiny_checkpoint, enable_return_routed_experts=True, enable_transfer_obj_ref=True
    )


def request(**fields: Any) -> GenerateRequest:
    defaults = {"input_ids": [5, 6, 7, 8], "max_new_tokens": 6, "ignore_eos": True}
    return GenerateRequest.model_validate(
        {**defaults, "return_routed_experts": True, "seed": 1, **fields}
    )


def test_a_rollout_becomes_a_tensor(client: RoutedExpertsClient) -> None:
    result = client.generate(request(tag="one"))
    assert isinstance(result.routed_experts, str)
    assert (len(result.output_ids), result.num_routed_tokens) == (6, 9)
    record = client.get(result.routed_experts)
    assert record.ids.shape == (9, 4, 4)
    assert record.moe_layers == (0, 2, 3)
    batch = client.materialize([RoutedSequence(result.routed_experts, 10)], dtype="int64")
    assert batch.ids.dtype == torch.int64
    np.testing.assert_array_equal(batch.ids[:9].numpy(), record.ids)
    assert batch.valid.tolist() == [True] * 9 + [False]
    assert batch.layers == (0, 2, 3)
    elsewhere = client.materialize([RoutedSequence(result.routed_experts, 10)], where="decoder")
    assert torch.equal(elsewhere.ids.long(), batch.ids)
    ahead = client.prefetch([RoutedSequence(result.routed_experts, 10)]).result(30)
    assert torch.equal(ahead.ids, elsewhere.ids)
    assert client.release(tag="one") == 1
    with pytest.raises(KeyReleased):
        client.get(result.routed_experts)
    assert client.stats().live_keys == 0


def test_a_failed_member_does_not_fail_the_batch(client: RoutedExpertsClient) -> None:
    good, bad, also = client.generate_batch([request(), request(input_ids=[9999]), request()])
    assert (good.finish_reason, also.finish_reason) == ("length", "length")
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert "9999" in bad.error
    client.release([str(good.routed_experts), str(also.routed_experts)])


def test_typed_errors_come_through_the_handle(client: RoutedExpertsClient) -> None:
    with pytest.raises(InvalidRequest, match="9999"):
        client.generate(request(input_ids=[9999]))


def test_streaming_gives_the_same_tokens(client: RoutedExpertsClient) -> None:
    whole = client.generate(request())
    chunks = list(client.stream(request()))
    last = chunks[-1].result
    assert last is not None
    assert [token for chunk in chunks for token in chunk.output_ids] == whole.output_ids
    assert last.output_ids == whole.output_ids
    assert "".join(chunk.text for chunk in chunks) == whole.text
    client.release([str(whole.routed_experts), str(last.routed_experts)])


def test_without_transfer_the_answer_is_the_array(tiny_checkpoint: Path) -> None:
    client = serve_locally(tiny_checkpoint, enable_return_routed_experts=True)
    result = client.generate(request())
    assert isinstance(result.routed_experts, np.ndarray)
    assert result.routed_experts.shape == (9, 4, 4)
    assert client.stats().live_keys == 0


def test_asking_an_engine_that_records_nothing_says_so(tiny_checkpoint: Path) -> None:
    result = serve_locally(tiny_checkpoint).generate(request())
    assert result.routed_experts is None
    assert result.routed_experts_error is not None
    assert "enable_return_routed_experts is off" in result.routed_experts_error


def test_new_weights_change_tokens_and_version(
    client: RoutedExpertsClient, tiny_checkpoint: Path
) -> None:
    before = client.generate(request(temperature=0))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = {name: -value for name, value in old.items()}
    (taken,) = client.update_weights(new, version=3)
    assert (taken.version, taken.error) == (3, None)
    after = client.generate(request(temperature=0))
    assert (before.weight_version, after.weight_version) == (0, 3)
    assert before.output_ids != after.output_ids
    assert client.get(str(after.routed_experts)).weight_version == 3
    with pytest.raises(WeightsMismatch, match="unknown: extra"):
        client.update_weights({**old, "extra": torch.zeros(1)}, version=4)
    client.update_weights(old, version=5)
    again = client.generate(request(temperature=0))
    assert (again.output_ids, again.weight_version) == (before.output_ids, 5)


def test_aborting_nothing_is_no_error_but_must_say_what(client: RoutedExpertsClient) -> None:
    assert client.abort("no such request") == 0
    assert client.abort(all=True) == 0
    with pytest.raises(ValueError, match="request_id"):
        client.abort()
