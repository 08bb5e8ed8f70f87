"""``r3serve doctor``: will r3serve run here, and if not, what to do."""

from pathlib import Path
from typing import Annotated

import ray
import typer
from ray import serve
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from yaml import YAMLError

from serve_app.cli.attaching import attach, sorry
from serve_app.cli.groups import engines, placed_groups, room_for, serving
from serve_app.cli.machine import Finding, examine
from serve_app.cli.serve_config import check_serve_config, serve_config_text
from serve_app.config import ray_environment
from serve_app.deployments.gpus import live_nodes, nodes_come

_STYLES = {"ok": "green", "warning": "yellow", "wrong": "red"}


def doctor(
    address: Annotated[
        str | None, typer.Option(help="Also look at the Ray cluster there, as ray.init takes it.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A Serve config file: does that cluster have room for its engines?"),
    ] = None,
) -> None:
    """Check versions, GPU, shared memory, ports and auth; say what to do."""
    if config is not None and address is None:
        raise sorry("--config asks what a cluster has room for: say which, with --address")
    findings = examine(ray_environment())
    if address is not None:
        attach(address)
        findings += cluster_nodes() + cluster_groups()
    if config is not None:
        findings += config_groups(config)
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


def cluster_groups() -> list[Finding]:
    """Look at what the connected cluster serves: engines, and where their groups are."""
    table = ray.util.placement_group_table()
    return [*serving(serve.status().applications), *placed_groups(table, live_nodes())]


def config_groups(config: Path) -> list[Finding]:
    """Look at whether the connected cluster has room for the engines of a Serve config file."""
    try:
        checked = check_serve_config(serve_config_text(config), models_elsewhere=True)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise sorry(f"{config}: {error}") from None
    if checked.problems:
        raise sorry("\n".join(f"{config}: {problem}" for problem in checked.problems))
    return [
        room_for(application.name, args, live_nodes(), live_nodes(free=True), nodes_come())
        for application in checked.applications
        for args in engines(application)
    ]


def _table(findings: list[Finding]) -> Table:
    table = Table("", "what", "found", "what to do")
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(
            f"[{style}]{finding.verdict}[/]",
            *map(escape, (finding.what, finding.found, finding.advice)),
        )
    return table
