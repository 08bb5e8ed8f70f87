"""``r3serve doctor``: will r3serve run here, and if not, what to do."""

from typing import Annotated

import ray
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve_app.cli.attaching import attach
from serve_app.cli.machine import Finding, examine
from serve_app.config import ray_environment

_STYLES = {"ok": "green", "warning": "yellow", "wrong": "red"}


def doctor(
    address: Annotated[
        str | None, typer.Option(help="Also look at the Ray cluster there, as ray.init takes it.")
    ] = None,
) -> None:
    """Check versions, GPU, shared memory, ports and auth; say what to do."""
    findings = examine(ray_environment())
    if address is not None:
        attach(address)
        findings += cluster_nodes()
    Console().print(_table(findings))
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(1)


def cluster_nodes() -> list[Finding]:
    """Look at the connected cluster's nodes: what each has for records."""
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not node["Alive"]:
            continue
        store = node["Resources"].get("object_store_memory", 0)
        cpus, gpus = (node["Resources"].get(kind, 0) for kind in ("CPU", "GPU"))
        found.append(
            Finding(
                f"node {node['NodeID'][:10]}",
                "ok",
                f"{cpus:g} CPUs, {gpus:g} GPUs, object store {store / (1 << 30):.1f} GiB,"
                f" half of it for records",
            )
        )
    return found


def _table(findings: list[Finding]) -> Table:
    table = Table("", "what", "found", "what to do")
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(
            f"[{style}]{finding.verdict}[/]",
            *map(escape, (finding.what, finding.found, finding.advice)),
        )
    return table
