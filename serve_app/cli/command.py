"""The command itself: what can be said after ``r3serve``."""

import typer

from serve_app.cli.doctor import doctor
from serve_app.cli.fetch import fetch
from serve_app.cli.plot import plot
from serve_app.cli.store import store
from serve_app.cli.trace import trace
from serve_app.cli.validate import validate

main = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools for r3serve.")
main.add_typer(store, name="store")
main.command()(doctor)
main.command()(fetch)
main.command()(plot)
main.command()(trace)
main.command()(validate)


@main.callback()
def _main() -> None:
    """Tools for r3serve."""
