"""How a command reaches a Ray cluster, and how it says that it cannot go on."""

import logging
import socket
from typing import Annotated

import ray
import typer
from rich.console import Console

Address = Annotated[str, typer.Option(help="The Ray cluster, as ray.init takes it.")]


def attach(address: str) -> None:
    """Connect to a running cluster; the command ends if there is none."""
    if ray.is_initialized():
        return
    try:
        host, colon, port = address.rpartition(":")
        if colon:  # ray.init tries for many minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError) as error:
        raise sorry(f"no Ray cluster at {address!r}: {error}") from None


def sorry(why: str) -> typer.Exit:
    """Print why a command ends; raise what this returns."""
    Console(stderr=True).print(why, style="red", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(1)
