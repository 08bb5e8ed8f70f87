"""Which class serves which backend; its heavy libraries load only when it is chosen."""

from serve_app.config import EngineArgs
from serve_app.engines.base import Engine, TakeRows


def load_engine(args: EngineArgs, take_rows: TakeRows | None = None) -> Engine:
    """Load the model that ``args`` name and return its engine."""
    if args.backend == "transformers":
        from serve_app.engines.transformers.engine import TransformersEngine

        return TransformersEngine(args)
    from serve_app.engines.lmdeploy.options import check_installed

    check_installed()
    from serve_app.engines.lmdeploy.model import read_model
    from serve_app.engines.lmdeploy.options import check_machine, engine_config, split_options

    model = read_model(args)
    options = split_options(args.engine_kwargs)
    config = engine_config(args, options, model.info.context_length)
    check_machine(config)
    from serve_app.engines.lmdeploy.engine import LmdeployEngine

    return LmdeployEngine(args, model, options.own, config, take_rows)
