"""``r3serve validate``: is a Serve config file what it seems to be?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from serve_app.cli.attaching import sorry
from serve_app.cli.groups import engines, group_text
from serve_app.cli.serve_config import ServedApplication, check_serve_config, serve_config_text
from serve_app.config import EngineArgs
from serve_app.serve_options import ServeOptions


def validate(
    config: Annotated[Path, typer.Argument(help="A Serve config file, or a RayService manifest.")],
    models_elsewhere: Annotated[
        bool, typer.Option(help="Do not look for the model on this machine.")
    ] = False,
) -> None:
    """Check CONFIG strictly: Serve's own keys, each builder, each builder's arguments."""
    try:
        checked = check_serve_config(serve_config_text(config), models_elsewhere)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise sorry(f"{config}: {error}") from None
    if checked.problems:
        raise sorry("\n".join(f"{config}: {problem}" for problem in checked.problems))
    for application in checked.applications:
        Console().print(_table(application))
        for args in engines(application):
            if not args.group.alone:
                Console().print(
                    f"engine: {group_text(args)}; min_replicas and max_replicas count such groups",
                    highlight=False,
                )


def _table(application: ServedApplication) -> Table:
    """Show what Serve will run, and what it asks for at its largest."""
    table = Table("deployment", "replicas", "CPUs", "GPUs", title=application.name)
    cpus = gpus = 0.0
    for name, part in application.args or ():
        options = part.placed if isinstance(part, EngineArgs) else getattr(part, "serve", None)
        if not isinstance(options, ServeOptions):
            continue
        most = options.max_replicas
        cpu, gpu = options.cpus_per_replica, options.gpus_per_replica
        cpus, gpus = cpus + most * cpu, gpus + most * gpu
        replicas = f"{options.min_replicas}-{most}" if options.min_replicas < most else f"{most}"
        table.add_row(name, replicas, f"{cpu:g}", f"{gpu:g}")
    table.add_row("at its largest", "", f"{cpus:g}", f"{gpus:g}", style="bold")
    return table
