"""One JSON line a request: who, what, how long. No key, no prompt, no query, no free path."""

import json
import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

logger = logging.getLogger("r3serve.access")


@dataclass(slots=True)
class Entry:
    """What is known of one request so far."""

    request_id: str
    method: str
    path: str
    client: str | None
    caller: str = "anonymous"
    status: int = 499  # what nginx calls a client that did not wait
    bytes_in: int = 0
    bytes_out: int = 0
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    def started(self, status: int) -> None:
        """Note that an answer begins."""
        self.status = status
        self.first_s = time.monotonic() - self.began


class AccessLog:
    """Writes entries to stdout; paths that no route has are logged as ``-``."""

    def __init__(self, enabled: bool, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self._enabled = enabled
        if enabled and not logger.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)

    def write(self, entry: Entry) -> None:
        """Write one line."""
        if not self._enabled:
            return
        line = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": entry.request_id,
            "caller": entry.caller,
            "client": entry.client,
            "method": entry.method if entry.method.isalpha() and len(entry.method) < 16 else "-",
            "path": entry.path if entry.path in self._paths else "-",
            "status": entry.status,
            "bytes_in": entry.bytes_in,
            "bytes_out": entry.bytes_out,
            "first_ms": None if entry.first_s is None else round(entry.first_s * 1e3, 1),
            "ms": round((time.monotonic() - entry.began) * 1e3, 1),
        }
        logger.info(json.dumps(line, separators=(",", ":")))
