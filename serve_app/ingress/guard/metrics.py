"""What the HTTP edge exports; names, labels and meaning are in docs/metrics.md."""

import time
from collections.abc import Iterable

from serve_app.ingress.guard.access_log import Entry
from serve_app.observe.instruments import Instrument, Instruments

INGRESS = {
    "r3serve_http_requests_total": Instrument(
        "counter", "Requests answered; 499 where the client left.", ("path", "status")
    ),
    "r3serve_http_bytes_in_total": Instrument("counter", "Bytes of their bodies.", ("path",)),
    "r3serve_http_bytes_out_total": Instrument("counter", "Bytes of the answers.", ("path",)),
    "r3serve_http_seconds": Instrument("seconds", "From request to the answer's end.", ("path",)),
}


class IngressMetrics:
    """Reports the requests of one replica; paths that no route has are one label, ``-``."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self._instruments = Instruments(INGRESS)

    def answered(self, entry: Entry) -> None:
        """Report one request."""
        path, report = entry.path if entry.path in self._paths else "-", self._instruments
        report.count("r3serve_http_requests_total", path=path, status=str(entry.status))
        report.count("r3serve_http_bytes_in_total", entry.bytes_in, path=path)
        report.count("r3serve_http_bytes_out_total", entry.bytes_out, path=path)
        report.took("r3serve_http_seconds", time.monotonic() - entry.began, path=path)
