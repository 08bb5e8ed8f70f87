"""The whole graph around LMDeploy on CUDA: keys, tensors on the device, weights, sleep."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from graphs.rollout import build
from serve_app.client import RoutedExpertsClient
from serve_app.config import RolloutArgs
from serve_app.types import GenerateRequest, RoutedSequence

APP = "gpu"
LAYERS, TOP_K = 3, 4


@pytest.fixture(scope="module")
def client(sparse: Path) -> Iterator[RoutedExpertsClient]:
    args = {
        "engine": {
            "backend": "lmdeploy",
            "model": str(sparse),
            "dtype": "bfloat16",
            "enable_return_routed_experts": True,
            "enable_transfer_obj_ref": True,
            "engine_kwargs": {"cache_max_entry_count": 0.1},
            "serve": {"num_gpus": 0.5},
        }
    }
    ray.init(address="local", include_dashboard=False, object_store_memory=1 << 30)
    serve.start(proxy_location="Disabled")
    serve.run(build(RolloutArgs.model_validate(args)), name=APP, route_prefix=None)
    yield RoutedExpertsClient(APP)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def request(length: int, new: int) -> GenerateRequest:
    return GenerateRequest(
        input_ids=[3 + i % 200 for i in range(length)],
        max_new_tokens=new,
        temperature=0.0,
        ignore_eos=True,
        return_routed_experts=True,
    )


def test_keys_become_a_tensor_on_the_device(client: RoutedExpertsClient) -> None:
    results = client.generate_batch([request(10 + n, 20) for n in range(32)])
    sequences = [RoutedSequence(str(r.routed_experts), r.num_routed_tokens) for r in results]
    rows = sum(sequence.length for sequence in sequences)
    assert rows == sum(10 + n + 20 - 1 for n in range(32))
    out = torch.empty((rows, LAYERS, TOP_K), dtype=torch.uint8, pin_memory=True)
    batch = client.materialize(sequences, where="local", out=out)
    on_device = batch.ids.to("cuda", non_blocking=True)
    by_decoder = client.materialize(sequences, where="decoder")
    assert torch.equal(on_device.cpu(), by_decoder.ids)
    assert batch.valid.all()
    assert int(batch.ids.max()) < 16
    assert client.release([str(sequence.key) for sequence in sequences]) == 32


def test_a_conversation_keeps_the_rows_of_its_turns(client: RoutedExpertsClient) -> None:
    first = client.generate(request(40, 30))
    before = client.get(str(first.routed_experts)).ids.copy()
    tokens = [*request(40, 30).input_ids, *first.output_ids, 5, 6, 7]
    second = client.generate(
        GenerateRequest(
            input_ids=tokens,
            max_new_tokens=10,
            temperature=0.0,
            ignore_eos=True,
            return_routed_experts=True,
            continue_from=str(first.routed_experts),
        )
    )
    after = client.get(str(second.routed_experts)).ids
    assert len(after) == len(tokens) + 10 - 1
    assert (after[: len(before)] == before).all()
    client.release([str(first.routed_experts), str(second.routed_experts)])


def test_new_weights_sample_other_tokens(client: RoutedExpertsClient, sparse: Path) -> None:
    old = client.generate(request(12, 16))
    model = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.bfloat16)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {
        name: value.flip(0) if "lm_head" in name else value for name, value in original.items()
    }
    assert not any(done.error for done in client.update_weights(changed, version=1, mode="drain"))
    new = client.generate(request(12, 16))
    assert new.weight_version == 1
    assert new.output_ids != old.output_ids
    assert not any(done.error for done in client.update_weights(original, version=2, mode="abort"))
    again = client.generate(request(12, 16))
    assert again.output_ids == old.output_ids


def test_sleep_gives_the_device_back(client: RoutedExpertsClient) -> None:
    before = client.generate(request(12, 16))
    awake, _ = torch.cuda.mem_get_info()
    client.sleep(2)
    asleep, _ = torch.cuda.mem_get_info()
    assert asleep > awake
    refused = client.generate_batch([request(12, 4)])[0]
    assert refused.error is not None
    assert "sleep" in refused.error
    client.wake()
    assert client.generate(request(12, 16)).output_ids == before.output_ids
