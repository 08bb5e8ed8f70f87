"""Which class serves which backend; its heavy libraries load only when it is chosen."""

from typing import TYPE_CHECKING

from serve_app.config import EngineArgs
from serve_app.engines.base import Engine, TakeRows
from serve_app.engines.lmdeploy.workers.seat import ALONE, Seat

if TYPE_CHECKING:
    from serve_app.engines.lmdeploy.workers.worker import GroupWorker


def load_engine(
    args: EngineArgs,
    take_rows: TakeRows | None = None,
    seat: Seat = ALONE,
    worker: "type[GroupWorker] | None" = None,
) -> Engine:
    """Load the model that ``args`` name and return its engine.

    ``seat``: where the workers of an engine group sit, and ``worker`` what they are.
    """
    if args.backend == "transformers":
        from serve_app.engines.transformers.engine import TransformersEngine

        return TransformersEngine(args)
    from serve_app.engines.lmdeploy.options import check_installed

    check_installed()
    from serve_app.engines.lmdeploy.model import read_model
    from serve_app.engines.lmdeploy.options import check_machine, engine_config, split_options

    model = read_model(args)
    options = split_options(args.engine_kwargs)
    config = engine_config(args, options, model.info.context_length, seat.dp_rank)
    check_machine(config)
    from serve_app.engines.lmdeploy.engine import LmdeployEngine

    return LmdeployEngine(args, model, options.own, config, take_rows, seat, worker)
