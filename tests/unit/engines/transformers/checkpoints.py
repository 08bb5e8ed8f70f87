"""Checkpoints of tests, copied and loaded into engines."""

import shutil
from pathlib import Path
from typing import Any

from serve_app.config import EngineArgs
from serve_app.engines.transformers.engine import TransformersEngine


def load(path: Path, **overrides: Any) -> TransformersEngine:
    defaults: dict[str, Any] = {
        "model": str(path),
        "dtype": "float32",
        "max_batch_size": 8,
        "enable_return_routed_experts": True,
        "engine_kwargs": {"num_threads": 1},
    }
    return TransformersEngine(EngineArgs(**{**defaults, **overrides}))


def copy_checkpoint(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
