"""Which class serves which backend; its heavy libraries load only when it is chosen."""

from serve_app.config import EngineArgs
from serve_app.engines.base import Engine


def load_engine(args: EngineArgs) -> Engine:
    """Load the model that ``args`` name and return its engine."""
    if args.backend == "transformers":
        from serve_app.engines.transformers import TransformersEngine

        return TransformersEngine(args)
    from serve_app.engines.lmdeploy_model import read_model
    from serve_app.engines.lmdeploy_options import check_installed, check_machine, split_options

    check_installed()
    model = read_model(args)
    options = split_options(args.engine_kwargs)
    check_machine()
    from serve_app.engines.lmdeploy import LmdeployEngine

    return LmdeployEngine(args, model, options)
