"""The command ``r3serve``: look at an application's store, or remove it."""

import logging
import socket
from dataclasses import fields
from typing import Annotated

import ray
import typer
from rich.console import Console
from rich.table import Table

from serve_app.errors import R3Error
from serve_app.store.client import connect
from serve_app.store.directory import list_actors
from serve_app.types import ShardStats, StoreStats

Address = Annotated[str, typer.Option(help="The Ray cluster, as ray.init takes it.")]

main = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools for r3serve.")
store = typer.Typer(no_args_is_help=True, help="The expert store of a served application.")
main.add_typer(store, name="store")


@main.callback()
def _main() -> None:
    """Tools for r3serve."""


@store.command()
def status(app: str, address: Address = "auto") -> None:
    """Show what each shard of APP holds and what happened to it."""
    _attach(address)
    try:
        stats = connect(app).stats()
    except R3Error as error:
        raise _sorry(str(error)) from None
    Console().print(_table(app, stats))


@store.command()
def destroy(app: str, address: Address = "auto") -> None:
    """Remove APP's shards now, with every record in them."""
    _attach(address)
    actors = list_actors(app)
    if not actors:
        raise _sorry(f"no expert store of an application named {app!r} runs in this cluster")
    for actor in actors:
        ray.kill(actor)
    Console().print(f"removed {len(actors)} actors of {app}")


def _attach(address: str) -> None:
    if ray.is_initialized():
        return
    try:
        host, colon, port = address.rpartition(":")
        if colon:  # ray.init tries for many minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError) as error:
        raise _sorry(f"no Ray cluster at {address!r}: {error}") from None


def _sorry(why: str) -> typer.Exit:
    Console(stderr=True).print(why, style="red", highlight=False)
    return typer.Exit(1)


def _table(app: str, stats: StoreStats) -> Table:
    columns = [field.name for field in fields(ShardStats) if field.name != "shard"]
    table = Table("shard", *columns, title=f"expert store of {app}")
    for shard in stats.shards:
        table.add_row(shard.shard, *(f"{getattr(shard, column):,.0f}" for column in columns))
    for name in stats.unreachable:
        table.add_row(name, "does not answer")
    return table
