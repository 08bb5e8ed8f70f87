"""``r3serve store``: look at an application's store, or remove it."""

from dataclasses import fields

import ray
import typer
from rich.console import Console
from rich.table import Table

from serve_app.cli.attaching import Address, attach, sorry
from serve_app.errors import R3Error
from serve_app.store.client import connect
from serve_app.store.directory import list_actors
from serve_app.types import ShardStats, StoreStats

store = typer.Typer(no_args_is_help=True, help="The expert store of a served application.")


@store.command()
def status(app: str, address: Address = "auto") -> None:
    """Show what each shard of APP holds and what happened to it."""
    attach(address)
    try:
        stats = connect(app).stats()
    except R3Error as error:
        raise sorry(str(error)) from None
    Console().print(_table(app, stats))


@store.command()
def destroy(app: str, address: Address = "auto") -> None:
    """Remove APP's shards now, with every record in them."""
    attach(address)
    actors = list_actors(app)
    if not actors:
        raise sorry(f"no expert store of an application named {app!r} runs in this cluster")
    for actor in actors:
        ray.kill(actor)
    Console().print(f"removed {len(actors)} actors of {app}")


def _table(app: str, stats: StoreStats) -> Table:
    columns = [field.name for field in fields(ShardStats) if field.name != "shard"]
    table = Table("shard", *columns, title=f"expert store of {app}")
    for shard in stats.shards:
        table.add_row(shard.shard, *(f"{getattr(shard, column):,.0f}" for column in columns))
    for name in stats.unreachable:
        table.add_row(name, "does not answer")
    return table
