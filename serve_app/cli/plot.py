"""``r3serve plot``: pictures of what routing did, from a snapshot or a running store."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve_app.cli.attaching import Address, attach, sorry
from serve_app.cli.progress import progress_bar
from serve_app.errors import R3Error, RecordError, SnapshotError
from serve_app.observe.loads import ExpertLoads
from serve_app.records import Record
from serve_app.store.access.client import connect
from serve_app.store.snapshot import Progress, read_page, saved_app, snapshot_files


def plot(
    source: Annotated[str, typer.Argument(help="A snapshot's directory, or an application.")],
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path(),
    tag: Annotated[str | None, typer.Option(help="Only this tag (of an application).")] = None,
    address: Address = "auto",
) -> None:
    """Draw expert load per layer, and drift between weight versions, as PNG."""
    if find_spec("matplotlib") is None:
        raise sorry("r3serve plot draws with matplotlib: pip install 'r3serve[plot]'")
    loads, refused = ExpertLoads(), list[str]()
    try:
        with progress_bar("records") as progress:
            for record in _records(source, tag, address, progress, refused):
                try:
                    loads.add(record)
                except RecordError as error:
                    refused.append(str(error))
    except R3Error as error:
        raise sorry(str(error)) from None
    for line in refused:
        Console(stderr=True).print(line, style="yellow", markup=False)
    if not loads.versions:
        raise sorry(f"{source} holds no records to draw")
    _draw(loads, out)


def _records(
    source: str, tag: str | None, address: str, progress: Progress, refused: list[str]
) -> Iterator[Record]:
    """Yield what a snapshot or an application holds; name the files that cannot be read."""
    if Path(source).is_dir():
        if tag is not None:
            raise SnapshotError("a snapshot is drawn whole: save one of that tag")
        yield from _saved(Path(source), progress, refused)
        return
    attach(address)
    store, done = connect(source), 0
    total = store.stats().live_keys
    for entries, records in store.pages(tag):
        yield from records
        done += len(entries)
        progress(done, max(done, total))


def _saved(path: Path, progress: Progress, refused: list[str]) -> Iterator[Record]:
    files = snapshot_files(path)
    for done, file in enumerate(files, 1):
        try:
            yield from read_page(file, saved_app(file)).records
        except SnapshotError as error:
            refused.append(str(error))
        progress(done, len(files))


def _draw(loads: ExpertLoads, out: Path) -> None:
    from serve_app.cli.pictures import drift_picture, load_picture

    out.mkdir(parents=True, exist_ok=True)
    load_picture(loads, out / "expert-load.png")
    Console().print(f"{out / 'expert-load.png'}: {sum(loads.tokens.values()):,} tokens")
    if len(loads.versions) < 2:
        Console().print("one weight version only: no drift to draw")
        return
    drift_picture(loads, out / "expert-drift.png")
    Console().print(f"{out / 'expert-drift.png'}: weight versions {loads.versions}")
