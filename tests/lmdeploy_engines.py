"""What tests of LMDeploy share, on a CPU and on a GPU: small engines, a plain model beside."""

from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.config import EngineArgs
from tests.plain_model import PlainModel


def small_args(path: Path, small: dict[str, Any], **overrides: Any) -> EngineArgs:
    """Return arguments of an engine for 8 rollouts; ``engine_kwargs`` are added to ``small``."""
    defaults: dict[str, Any] = {
        "backend": "lmdeploy",
        "model": str(path),
        "dtype": "float16",  # float32 on a CPU
        "max_batch_size": 8,
        "enable_return_routed_experts": True,
    }
    kwargs = {**small, **overrides.pop("engine_kwargs", {})}
    return EngineArgs(**{**defaults, **overrides}, engine_kwargs=kwargs)


@pytest.fixture(scope="session")
def plain(sparse: Path) -> PlainModel:
    """The reference; on a CPU made before torch is patched, or it would compute other things."""
    return PlainModel(sparse, torch.float32)
