"""``r3serve store``: an application's store: look at it, save it, bring it back, remove it."""

from dataclasses import fields
from pathlib import Path

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from serve_app.cli.attaching import Address, attach, sorry
from serve_app.cli.progress import progress_bar
from serve_app.errors import R3Error
from serve_app.store.access import archive
from serve_app.store.access.client import connect
from serve_app.store.owner.directory import remove_actors, this_cluster
from serve_app.types import ShardStats, StoreStats

_REMOVE_S = 30.0
_ANY = 10_000
_COLUMNS = [field.name for field in fields(ShardStats) if field.name != "shard"]

store = typer.Typer(no_args_is_help=True, help="The expert store of a served application.")


@store.command()
def status(app: str, address: Address = "auto") -> None:
    """Show what each shard of APP holds and what happened to it."""
    attach(address)
    try:
        stats = connect(app).stats()
    except R3Error as error:
        raise sorry(str(error)) from None
    _show(Console(), f"expert store of {app} in {this_cluster()}", stats)


@store.command()
def destroy(app: str, address: Address = "auto") -> None:
    """Remove APP's shards now, with every record in them."""
    attach(address)
    try:
        removed = remove_actors(app, _REMOVE_S)
    except R3Error as error:
        raise sorry(str(error)) from None
    if not removed:
        raise sorry(f"no expert store of an application named {app!r} runs in {this_cluster()}")
    Console().print(f"removed {removed} actors of {app} in {this_cluster()}")


@store.command()
def snapshot(app: str, path: Path, tag: str | None = None, address: Address = "auto") -> None:
    """Save APP's live records, or a tag's, into the new directory PATH."""
    attach(address)
    try:
        with progress_bar("saved") as progress:
            report = archive.save(connect(app), path, tag, progress)
    except R3Error as error:
        raise sorry(str(error)) from None
    Console().print(f"saved {report.records:,} records, {report.nbytes:,} bytes, in {path}")


@store.command()
def restore(app: str, path: Path, address: Address = "auto") -> None:
    """Bring a snapshot's records back into APP, on this node, under their old keys."""
    attach(address)
    try:
        with progress_bar("restored") as progress:
            report = archive.restore(connect(app), path, progress)
    except R3Error as error:
        raise sorry(str(error)) from None
    Console().print(f"restored {report.records:,} records, {report.nbytes:,} bytes")
    if report.refused:
        raise sorry("\n".join(report.refused))


def _show(console: Console, title: str, stats: StoreStats) -> None:
    """Print a line a shard, or a table a shard where the lines would not fit."""
    table = Table("shard", *_COLUMNS, title=title)
    for shard in stats.shards:
        table.add_row(shard.shard, *_figures(shard))
    for name in stats.unreachable:
        table.add_row(name, "does not answer")
    if Measurement.get(console, console.options.update(width=_ANY), table).maximum <= console.width:
        console.print(table)
        return
    console.print(title, style="italic", highlight=False)
    for shard in stats.shards:
        stacked = Table("shard", shard.shard)
        for column, figure in zip(_COLUMNS, _figures(shard), strict=True):
            stacked.add_row(column, figure)
        console.print(stacked)
    for name in stats.unreachable:
        console.print(f"{name} does not answer")


def _figures(shard: ShardStats) -> list[str]:
    return [f"{getattr(shard, column):,.0f}" for column in _COLUMNS]
