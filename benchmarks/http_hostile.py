"""What hostile requests cost, and what they are answered.

    python -m benchmarks.http_hostile [--bare]

A body of 1 GiB, said and unsaid, a prompt of 10⁷ tokens, 10⁵ headers, a wrong key, and clients
that stop reading: one JSON line each, with the memory of proxy and ingress before, at its peak
while it went on (looked at every 20 ms), and after. ``--bare`` leaves Serve's proxy without
`serve_app.ingress.proxy`, to see what that is good for.
"""

import argparse
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness.http_graph import PORT, proxied_ray, served
from benchmarks.harness.lines import emit
from benchmarks.harness.machine import describe, versions
from benchmarks.harness.processes import resident_mib
from serve_app.client import RoutedExpertsClient

APP = "hostile"
KEY = "a-key"
GIB = 1 << 30
PIECE = b"[" * (1 << 16)
READERS = 64


class Peak(threading.Thread):
    """Looks at the memory of proxy and ingress until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, float] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            for kind, mib in resident_mib().items():
                self.most[kind] = max(mib, self.most.get(kind, 0.0))
            self._over.wait(0.02)

    def end(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def measured(name: str, report: dict[str, Any]) -> Iterator[None]:
    before, peak, begun = resident_mib(), Peak(), time.monotonic()
    peak.start()
    try:
        yield
    finally:
        took = time.monotonic() - begun
        peak.end()
        after = settled()
        memory = {
            kind: {
                "before": round(before[kind], 1),
                "peak": round(peak.most[kind], 1),
                "after": round(after[kind], 1),
            }
            for kind in ("proxy", "ingress")
        }
        line = {"part": name, **report, "seconds": round(took, 2), "mib": memory}
        emit(line)


def settled() -> dict[str, float]:
    """Return memory once it has stopped to change."""
    last = resident_mib()
    for _ in range(20):
        time.sleep(0.5)
        now = resident_mib()
        if all(abs(now[kind] - last[kind]) < 0.5 for kind in now):
            break
        last = now
    return now


def head(path: str, headers: dict[str, str], key: str = KEY) -> bytes:
    lines = [f"POST /{APP}{path} HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}", *(f"{name}: {v}" for name, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def send(begin: bytes, pieces: Iterator[bytes], report: dict[str, Any]) -> None:
    """Send as much as is taken; note the status, and how much was sent before it came."""
    sent = 0
    with socket.create_connection(("127.0.0.1", PORT), timeout=60) as at:
        answer: list[bytes] = []

        def read() -> None:
            try:
                while piece := at.recv(65536):
                    answer.append(piece)
                    if b"\r\n" in b"".join(answer):
                        return
            except OSError as error:
                answer.append(f"{type(error).__name__}".encode())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            at.sendall(begin)
            for piece in pieces:
                if answer:
                    break
                at.sendall(piece)
                sent += len(piece)
        except OSError as error:
            report["cut_off_by"] = type(error).__name__
        reader.join(60)
    report["answer"] = b"".join(answer).split(b"\r\n")[0].decode(errors="replace")
    report["mib_sent"] = round(sent / (1 << 20), 2)


def pieces_of(total: int) -> Iterator[bytes]:
    for _ in range(total // len(PIECE)):
        yield PIECE


def chunked(total: int) -> Iterator[bytes]:
    for piece in pieces_of(total):
        yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


def said(report: dict[str, Any]) -> None:
    send(head("/generate", {"content-length": str(GIB)}), pieces_of(GIB), report)


def unsaid(report: dict[str, Any]) -> None:
    send(head("/generate", {"transfer-encoding": "chunked"}), chunked(GIB), report)


def tokens(report: dict[str, Any]) -> None:
    body = b'{"input_ids":[' + b",".join([b"5"] * 10**7) + b"]}"
    begin = head("/generate", {"content-length": str(len(body))})
    send(begin, (body[at : at + 65536] for at in range(0, len(body), 65536)), report)


def headers(report: dict[str, Any]) -> None:
    many = {f"x-{number}": "1" for number in range(10**5)}
    send(head("/generate", {**many, "content-length": "2"}), iter([b"{}"]), report)


def wrong_key(report: dict[str, Any]) -> None:
    size = 15 << 20
    begin = head("/generate", {"content-length": str(size)}, key="another")
    send(begin, pieces_of(size), report)


def stalled(report: dict[str, Any]) -> None:
    """Ask for long streams and read nothing but the beginning."""
    body = json.dumps({"input_ids": [5] * 200, "max_tokens": 20_000, "stream": True}).encode()
    begin = head("/generate", {"content-length": str(len(body))}) + body
    sockets = []
    for _ in range(READERS):
        at = socket.socket()
        at.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        at.connect(("127.0.0.1", PORT))
        at.sendall(begin)
        sockets.append(at)
    client = RoutedExpertsClient(APP)
    time.sleep(2)  # until all have begun
    waited = time.monotonic()
    while sum(client._graph.broadcast("ongoing")) and time.monotonic() - waited < 60:
        time.sleep(0.5)
    report["readers"] = READERS
    report["still_sampled_for_them"] = sum(client._graph.broadcast("ongoing"))
    report["seconds_until_idle"] = round(time.monotonic() - waited + 2, 1)
    report["mib_while_connected"] = {k: round(v, 1) for k, v in settled().items()}
    for at in sockets:
        at.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bare", action="store_true")
    args = parser.parse_args()
    attacks: dict[str, Callable[[dict[str, Any]], None]] = {
        "10^5 headers": headers,
        "wrong key, 15 MiB": wrong_key,
        "10^7 tokens": tokens,
        "1 GiB body": said,
        "1 GiB body, chunked": unsaid,
        "readers that stop": stalled,
    }
    with (
        proxied_ray(guarded=not args.bare),
        served(APP, fast=True, api_keys=[KEY]),
    ):
        said({})  # imports, first pages
        settled()
        for name, attack in attacks.items():
            report: dict[str, Any] = {"guarded": not args.bare}
            with measured(name, report):
                attack(report)
        last: dict[str, Any] = {}
        body = b'{"input_ids":[5],"max_tokens":1}'
        send(head("/generate", {"content-length": str(len(body))}), iter([body]), last)
        emit({"part": "afterwards", "answer": last["answer"]})
    emit({"machine": describe(), "versions": versions()})


if __name__ == "__main__":
    main()
