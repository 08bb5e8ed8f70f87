"""The memory of what this run's own Ray started: proxies, replicas, shards."""

import os
from pathlib import Path

NAMES = {
    "proxy": "ProxyActor",
    "ingress": ":Ingress",
    "engine": ":InferenceEngine",
    "shard": "ray::Shard",
}


def resident_mib() -> dict[str, float]:
    """Return the resident memory of each kind of process, in MiB; shared pages counted too."""
    mine = _descendants(os.getpid())
    found = dict.fromkeys(NAMES, 0.0)
    for pid in mine:
        title = _read(pid, "cmdline").replace("\0", " ")
        for kind, name in NAMES.items():
            if name in title:
                found[kind] += _private_mib(pid)
    return found


def kill_replica(kind: str, signal: int) -> bool:
    """Kill one process of a kind; tell whether there was one."""
    for pid in _descendants(os.getpid()):
        if NAMES[kind] in _read(pid, "cmdline"):
            os.kill(pid, signal)
            return True
    return False


def _descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            text = _read(int(path.name), "stat")
            if text:
                parents[int(path.name)] = int(text.rpartition(")")[2].split()[1])
    found, added = {root}, {root}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added} - found
        found |= added
    return found - {root}


def _private_mib(pid: int) -> float:
    """What the process alone holds: the object store is mapped into all of them."""
    for line in _read(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _read(pid: int, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_text(errors="replace")
    except OSError:
        return ""
