"""What this machine offers r3serve, and what to do where it does not: one check a function."""

import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

Verdict = Literal["ok", "warning", "wrong"]

PORTS = {
    6379: ("Ray's control store", "ray start --port"),
    8000: ("HTTP", "http_options.port in the Serve config"),
    8265: ("Ray's dashboard and `serve deploy`", "ray start --dashboard-port"),
    10001: ("Ray's remote clients", "ray start --ray-client-server-port"),
}
_SHM = Path("/dev/shm")
_RAY_SHARE = 0.3  # of memory that Ray takes for its object store
_OPEN_FILES = 65_536
_VERSIONS = {
    "ray": ">=2.58.1,<2.61",
    "torch": ">=2.8",
    "transformers": ">=5.10",
    "numpy": ">=2.0",
    "pydantic": ">=2.10",
}
_WITH_LMDEPLOY = {"torch": "<=2.12.1"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at, what was found, and what to do if that is not right."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(environment: Mapping[str, str]) -> list[Finding]:
    """Look at everything that needs no cluster."""
    return [
        *_versions(),
        _gpu(),
        shared_memory(*_sizes()),
        _disk(Path(environment.get("RAY_TMPDIR", "/tmp"))),
        _open_files(),
        *_ports(),
        authentication(environment, Path.home() / ".ray" / "auth_token"),
        *_settings(environment),
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))
    yield Finding("r3serve", "ok", _installed("r3serve") or "from a source tree")
    engine = _installed("lmdeploy")
    for package, wanted in _VERSIONS.items():
        yield package_version(package, _installed(package), wanted, "pip install -U r3serve")
    if engine is None:
        yield Finding("lmdeploy", "ok", "not installed (backend transformers only)")
        return
    advice = "pip install -c constraints/cuda.txt 'r3serve[lmdeploy]'"
    yield package_version("lmdeploy", engine, "==0.18.0", advice)
    for package, wanted in _WITH_LMDEPLOY.items():
        finding = package_version(f"{package} for lmdeploy", _installed(package), wanted, advice)
        yield replace(finding, verdict="warning") if finding.verdict == "wrong" else finding


def package_version(what: str, found: str | None, wanted: str, advice: str) -> Finding:
    """Judge a package's version."""
    if found is None:
        return Finding(what, "wrong", "not installed", f"{advice} (expected {wanted})")
    if not SpecifierSet(wanted).contains(found.partition("+")[0], prereleases=True):
        return Finding(what, "wrong", found, f"expected {wanted}: {advice}")
    return Finding(what, "ok", found)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("GPU", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPU",
            "wrong",
            f"there is a driver, but torch {torch.__version__} does not see a GPU",
            "install a CUDA build of torch: constraints/cuda.txt",
        )
    return Finding("GPU", "ok", "none (backend lmdeploy needs one, transformers does not)")


def _sizes() -> tuple[int, int]:
    """Return the bytes of /dev/shm and of memory."""
    from ray._common.utils import get_system_memory

    return shutil.disk_usage(_SHM).total if _SHM.is_dir() else 0, get_system_memory()


def shared_memory(shm: int, memory: int) -> Finding:
    """Judge whether Ray's object store fits into /dev/shm, both in bytes."""
    store = int(memory * _RAY_SHARE)
    found = f"{_gib(shm)} of {_gib(memory)} memory; Ray's object store would take {_gib(store)}"
    if shm >= store:
        return Finding("/dev/shm", "ok", found)
    return Finding(
        "/dev/shm",
        "warning",
        found,
        f"Ray would use the disk instead: docker run --shm-size={store >> 20}m, in Kubernetes an"
        f" emptyDir of medium Memory, or ray start --object-store-memory={int(shm * 0.9)}",
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{_gib(free)} free in {folder}"
    if free > 10 << 30:
        return Finding("disk for spilling", "ok", found)
    return Finding(
        "disk for spilling", "warning", found, "ray start --object-spilling-directory=DIR"
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _OPEN_FILES:
        return Finding("open files", "ok", f"{soft:,}")
    raised = f"ulimit -n {_OPEN_FILES} before ray start"
    if 0 <= hard < _OPEN_FILES:
        raised += f" (the hard limit is {hard:,}: raise it first)"
    return Finding("open files", "warning", f"{soft:,}", raised)


def _ports() -> Iterator[Finding]:
    for port in PORTS:
        with socket.socket() as probe:
            probe.settimeout(1)
            yield port_use(port, probe.connect_ex(("127.0.0.1", port)) == 0)


def port_use(port: int, taken: bool) -> Finding:
    """Judge one of `PORTS`."""
    purpose, setting = PORTS[port]
    if not taken:
        return Finding(f"port {port}", "ok", f"free for {purpose}")
    return Finding(
        f"port {port}",
        "warning",
        "something listens",
        f"for {purpose}: fine if that is your Ray; otherwise change {setting}",
    )


def authentication(environment: Mapping[str, str], token_file: Path) -> Finding:
    """Judge Ray's token authentication."""
    mode = environment.get("RAY_AUTH_MODE")
    has_token = bool(environment.get("RAY_AUTH_TOKEN")) or any(
        path.is_file() for path in (Path(environment.get("RAY_AUTH_TOKEN_PATH", "")), token_file)
    )
    if mode == "token" and has_token:
        return Finding("auth", "ok", "token")
    if mode == "token":
        return Finding(
            "auth",
            "wrong",
            "RAY_AUTH_MODE=token, but there is no token",
            "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (in Kubernetes from the Secret)",
        )
    if mode == "disabled":
        return Finding("auth", "ok", "disabled: whoever reaches Ray's ports may do anything")
    return Finding(
        "auth",
        "warning",
        f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set",
        "Ray versions differ in their default: set it to token, or to disabled on a machine of"
        " your own, for every process alike",
    )


def _settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Name Ray's switches that are known to hurt."""
    if environment.get("RAY_SERVE_THROUGHPUT_OPTIMIZED") == "1":
        yield Finding(
            "RAY_SERVE_THROUGHPUT_OPTIMIZED",
            "warning",
            "1: gRPC handles by default",
            "they cap at 4 MiB and leak references; r3serve's own handles are set by reference",
        )
    if environment.get("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS") == "1":
        yield Finding(
            "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS",
            "warning",
            "1: tensors out of the object store are shared and writable",
            "one process can change what another reads: unset it",
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB"
