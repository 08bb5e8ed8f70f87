"""Where the ranks of a process group meet."""

import socket
from typing import TypeAlias

import ray

Address: TypeAlias = tuple[str, int]
"""Host and port of a node where something of ours runs: rank 0's, never the head's."""


def free_address() -> Address:
    """Return this node's address and a port that is free on it now."""
    with socket.socket() as found:
        found.bind(("", 0))
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return host, int(found.getsockname()[1])
