"""The arguments of an engine group, for tests of what is worked out from them."""

from pathlib import Path
from typing import Any

from serve_app.config import EngineArgs


def group_engine(model: Path, sizes: dict[str, Any], **serve: Any) -> EngineArgs:
    """Return an LMDeploy engine of these ``engine_kwargs``, its driver on one CPU."""
    return EngineArgs.model_validate(
        {
            "backend": "lmdeploy",
            "model": str(model),
            "engine_kwargs": sizes,
            "serve": {"num_cpus": 1, **serve},
        }
    )
