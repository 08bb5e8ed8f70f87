"""A checkpoint directory's tokenizer and the context length that it may be served with."""

from pathlib import Path

from serve_app.engines.detokenizer import Decode

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_decoder(path: Path) -> Decode | None:
    """Return what turns ids into text, None where the checkpoint came without a tokenizer."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def decode(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    return decode


def context_length(wanted: int | None, own: int | None) -> int:
    """Return the length to serve, in tokens; ValueError for more than the model's ``own``."""
    if wanted is None:
        if own is None:
            raise ValueError("the checkpoint has no context length: set context_length")
        return own
    if own is not None and wanted > own:
        raise ValueError(f"expected a context_length up to the model's own {own}, got {wanted}")
    return wanted
