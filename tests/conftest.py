"""What every test shares: an environment fixed before Ray or Transformers load."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    RAY_AUTH_MODE="disabled",
    # A reference that is sent where nobody counts it is a leak; make it an error.
    RAY_allow_out_of_band_object_ref_serialization="0",
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH="serve_app.ingress.proxy.middlewares",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts jobs in the background so, and their children would ignore our Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings

from examples.tiny_moe import write_checkpoint

settings.register_profile("tests", deadline=None)  # no test asserts a time
settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE with tokenizer: 4 layers, the second dense."""
    return write_checkpoint(
        tmp_path_factory.mktemp("tiny"), hidden=64, experts=16, dense_layers=(1,), context=512
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums over several have no fixed order, and small ones gain nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
