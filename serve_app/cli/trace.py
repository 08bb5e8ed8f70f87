"""``r3serve trace``: did a trainer's routers use what was recorded?"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serve_app.cli.attaching import sorry
from serve_app.errors import ReplayError

_FIELDS = ("sequence", "row", "layer", "valid", "recorded", "sliced", "used")


def trace(
    file: Annotated[Path, typer.Argument(help="What a Trace wrote while replay_routing was open.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether replay happened; 1 if it did not.")
    ] = False,
    lines: Annotated[int, typer.Option(min=1, help="How many lines the table has.")] = 20,
) -> None:
    """Show what was recorded, what the batch had and what routers used, or compare all of it."""
    # torch comes with it, which no other command needs.
    from serve_app.replay.verdict import check_trace, trace_lines

    try:
        if check:
            verdict = check_trace(file)
            if not verdict.happened:
                raise sorry(verdict.says)
            typer.echo(verdict.says)
            return
        table = Table(*_FIELDS, title=str(file))
        for line in islice(trace_lines(file), lines):
            table.add_row(*(_shown(line[field]) for field in _FIELDS))
    except ReplayError as error:
        raise sorry(str(error)) from None
    Console().print(table)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "native"
    return "-" if value is None else str(value).replace("[", "").replace("]", "")
