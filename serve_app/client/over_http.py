"""A key's routes over HTTP into a file, without Ray."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import requests

from serve_app.errors import (
    KeyExpired,
    KeyReleased,
    R3Error,
    RoutesLost,
    StoreError,
    StoreUnavailable,
    UnknownKey,
)
from serve_app.wire.formats.ours import from_bytes

Form = Literal["record", "npy", "safetensors"]
Progress = Callable[[int, int], None]

_ACCEPT: dict[Form, str] = {
    "record": "application/vnd.r3serve.record",
    "npy": "application/x-npy",
    "safetensors": "application/vnd.safetensors",
}
_ERRORS = {kind.__name__: kind for kind in (UnknownKey, KeyReleased, KeyExpired, RoutesLost)}
_TIMEOUT_S = (10.0, 120.0)
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """Which rows a key has, and how many of them one answer carries."""

    start: int
    stop: int
    most_rows: int


class RoutesFetcher:
    """Asks one server. ``api_key`` is one of its keys, if it has any."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/") + "/routed_experts/fetch"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def fetch(
        self,
        key: str,
        out: Path,
        form: Form = "record",
        *,
        first: int | None = None,
        rows: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Write rows of a key, or all, as ``out``; return how many.

        The file appears whole or not at all. An ``.npy`` may be larger than one answer. Raises
        why the key cannot be read, `RecordError` for bytes that are not what was sent,
        `StoreUnavailable` where there is no answer, `StoreError` for any other refusal.
        """
        extent = self._extent(key)
        first = extent.start if first is None else first
        rows = extent.stop - first if rows is None else rows
        with _appearing(out) as part:
            if form == "npy" and rows > extent.most_rows:
                self._fetch_pieces(key, part, first, rows, extent.most_rows, progress)
            else:
                self._fetch_whole(key, part, form, first, rows, progress)
            if form == "record":
                with part.open("rb") as file:
                    from_bytes(file.read())  # checks every byte
        return rows

    def _extent(self, key: str) -> Extent:
        with self._asked(key, "npy", None, None, head=True) as answer:
            names = ("x-r3serve-start", "x-r3serve-stop", "x-r3serve-most-rows")
            try:
                return Extent(*(int(answer.headers[name]) for name in names))
            except (KeyError, ValueError) as error:
                raise StoreError(f"{self._url} is no r3serve: {error}") from None

    def _fetch_whole(
        self, key: str, part: Path, form: Form, first: int, rows: int, progress: Progress | None
    ) -> None:
        with self._asked(key, form, first, rows) as answer, part.open("wb") as file:
            expected, done = int(answer.headers.get("content-length", -1)), 0
            for piece in _pieces(answer):
                done += file.write(piece)
                if progress is not None:
                    progress(done, expected)
        if done != expected:
            raise StoreUnavailable(f"expected {expected} bytes, the connection ended at {done}")

    def _fetch_pieces(
        self, key: str, part: Path, first: int, rows: int, most: int, progress: Progress | None
    ) -> None:
        whole: Any = None
        for start in range(0, rows, most):
            count = min(most, rows - start)
            piece = part.with_name(part.name + ".piece")
            try:
                self._fetch_whole(key, piece, "npy", first + start, count, None)
                ids = np.load(piece, mmap_mode="r", allow_pickle=False)
                if whole is None:
                    shape = (rows, *ids.shape[1:])
                    whole = np.lib.format.open_memmap(part, "w+", ids.dtype, shape)
                whole[start : start + count] = ids
            finally:
                piece.unlink(missing_ok=True)
            if progress is not None:
                progress(start + count, rows)
        whole.flush()

    @contextmanager
    def _asked(
        self, key: str, form: Form, first: int | None, rows: int | None, *, head: bool = False
    ) -> Iterator[requests.Response]:
        body: dict[str, Any] = {"key": key, "first": first, "rows": rows, "head": head}
        headers = {**self._headers, "accept": _ACCEPT[form]}
        try:
            with requests.post(
                self._url, json=body, headers=headers, stream=True, timeout=_TIMEOUT_S
            ) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer)
                yield answer
        except requests.RequestException as error:
            raise StoreUnavailable(f"{self._url} does not answer: {error}") from None


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    part = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    try:
        yield part
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _pieces(answer: requests.Response) -> Iterator[bytes]:
    yield from answer.iter_content(_PIECE)


def _refusal(answer: requests.Response) -> R3Error:
    try:
        said = answer.json()
        message, kind = str(said["message"]), str(said["type"])
    except (ValueError, KeyError, TypeError):
        message, kind = answer.text[:200], ""
    if kind in _ERRORS:
        return _ERRORS[kind](message)
    if answer.status_code in (408, 429, 502, 503, 504):
        return StoreUnavailable(f"{answer.status_code}: {message}")
    return StoreError(f"{answer.status_code}: {message}")
