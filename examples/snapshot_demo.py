"""A snapshot of rollouts under five weight versions, for `r3serve plot`.

python -m examples.snapshot_demo DIRECTORY
r3serve plot DIRECTORY --out docs

A small random Qwen3-MoE is served. Between versions every weight moves by a few per cent of its
layer's spread, which stands in for training.
"""

import argparse
from pathlib import Path

import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_moe import write_checkpoint
from graphs.rollout import build
from serve_app import GenerateRequest, RoutedExpertsClient
from serve_app.config import RolloutArgs

VERSIONS, GROUP, NEW_TOKENS, STEP = 5, 4, 48, 0.06
PROMPTS = Path(__file__).with_name("prompts.txt")


def moved(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + STEP * value.std() * torch.randn(value.shape, generator=generator)
        if value.ndim > 1
        else value
        for name, value in state.items()
    }


def record(model: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    client = RoutedExpertsClient("rollout")
    prompts = [tokenizer.encode(prompt)[:64] for prompt in PROMPTS.read_text().splitlines()]
    for version in range(VERSIONS):
        if version:
            state = moved(state, version)
            client.update_weights(state, version=version, mode="drain")
        requests = [
            GenerateRequest(
                input_ids=prompt,
                max_new_tokens=NEW_TOKENS,
                ignore_eos=True,
                return_routed_experts=True,
                seed=seed,
            )
            for seed in range(GROUP)
            for prompt in prompts
        ]
        results = client.generate_batch(requests)
        tokens = sum(result.num_routed_tokens for result in results)
        print(f"version {version}: {len(results)} rollouts, {tokens:,} rows", flush=True)
    report = client.snapshot(out)
    print(f"{report.records:,} records, {report.nbytes:,} bytes in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    out = parser.parse_args().directory
    model = write_checkpoint(
        Path("checkpoints/snapshot-demo"), hidden=128, layers=12, experts=64, top_k=4
    )
    engine = {
        "model": str(model),
        "enable_return_routed_experts": True,
        "enable_transfer_obj_ref": True,
        "max_batch_size": 64,
    }
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        serve.run(build(RolloutArgs.model_validate({"engine": engine})), name="rollout")
        record(model, out)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
