"""Which class serves which backend; its heavy libraries load only when it is chosen."""

from serve_app.config import EngineArgs
from serve_app.engines.base import Engine


def load_engine(args: EngineArgs) -> Engine:
    """Load the model that ``args`` names and return its engine."""
    if args.backend == "transformers":
        from serve_app.engines.transformers import TransformersEngine

        return TransformersEngine(args)
    raise ValueError(f"this version serves backend 'transformers', got {args.backend!r}")
