"""Write a small random Qwen3-MoE with a byte-level tokenizer, as a Hugging Face checkpoint.

python -m examples.tiny_moe DIRECTORY

Initialised sharply (``initializer_range`` 0.09): at the usual 0.02 a random model's logits are
so flat that routing hardly matters and replay has nothing to show.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SPECIAL = ("<pad>", "<s>", "</s>")
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_tokenizer(path: Path) -> None:
    """One token a byte, after the special ones."""
    vocab = {token: index for index, token in enumerate(SPECIAL)}
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[char] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT
    fast.save_pretrained(path)


def write_checkpoint(
    path: Path,
    *,
    hidden: int = 128,
    layers: int = 4,
    experts: int = 32,
    top_k: int = 4,
    dense_layers: tuple[int, ...] = (),
    vocab: int = 512,
    context: int = 2048,
    initializer_range: float = 0.09,
    seed: int = 0,
) -> Path:
    """Save model, tokenizer and config; a directory that already holds the same is kept."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is not declared
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        mlp_only_layers=list(dense_layers),
        max_position_embeddings=context,
        initializer_range=initializer_range,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    recipe = json.dumps({"seed": seed, **config.to_dict()}, sort_keys=True, default=str)
    mark = path / "recipe.json"
    if mark.is_file() and mark.read_text() == recipe:
        return path
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(path)
    write_tokenizer(path)
    mark.write_text(recipe)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo's Qwen3-MoE checkpoint.")
    parser.add_argument("directory", type=Path)
    print(write_checkpoint(parser.parse_args().directory))
