"""``r3serve fetch``: a key's routes into a file, over HTTP, without Ray."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from serve_app.cli.attaching import sorry
from serve_app.client.over_http import Form, RoutesFetcher
from serve_app.errors import R3Error

_FORMS: dict[str, Form] = {".npy": "npy", ".safetensors": "safetensors"}


def fetch(
    key: Annotated[str, typer.Argument(help="The key; - reads it from the standard input.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The file: .npy, .safetensors, else r3serve's form."),
    ],
    url: Annotated[str, typer.Option(help="Where the graph is served.")] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with one of the server's keys.")
    ] = None,
    first: Annotated[int | None, typer.Option(min=0, help="The first position wanted.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows, else all.")] = None,
) -> None:
    """Write the routes of KEY into a file."""
    if key == "-":
        key = sys.stdin.readline().strip()
    try:
        secret = None if api_key_file is None else api_key_file.read_text().strip()
        form = _FORMS.get(output.suffix, "record")
        count = RoutesFetcher(url, secret).fetch(key, output, form, first=first, rows=rows)
    except (R3Error, OSError) as error:
        raise sorry(f"{type(error).__name__}: {error}") from None
    size = output.stat().st_size
    typer.echo(f"{output}: {count} rows, {size:,} bytes")
