"""Whether replay happened: a trace read back, and its three columns compared as sets."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import ReplayError

FORMAT = {"r3serve_trace": 1}
_FIELDS = ("sequence", "row", "layer", "valid", "recorded", "sliced", "used")


@dataclass(frozen=True, slots=True)
class TraceVerdict:
    """What a trace shows; rows are token rows of all its passes, with all of their layers.

    ``replayed`` used the experts that came and, where the trace has them, were recorded;
    ``native`` had no routes (``valid=False``). ``recorded`` counts the (row, layer) pairs whose
    record stands beside them, ``mismatches`` those that differ, the first of which is at ``where``.
    """

    passes: int
    replayed: int
    native: int
    recorded: int
    mismatches: int
    where: str | None = None

    @property
    def happened(self) -> bool:
        """Whether there were routes and all of them were used."""
        return self.replayed > 0 and self.mismatches == 0

    @property
    def says(self) -> str:
        """The verdict in one line."""
        counts = (
            f"{self.replayed:,} rows replayed, {self.native:,} routed natively,"
            f" {self.mismatches:,} mismatches; forward passes: {self.passes:,}"
        )
        beside = "compared with their records" if self.recorded else "no records beside them"
        if self.mismatches:
            return f"replay did not happen: {counts}; the first: {self.where}"
        if not self.replayed:
            return f"replay did not happen: {counts}; no row had routes"
        return f"replay happened: {counts}; {beside}"


def check_trace(path: str | os.PathLike[str]) -> TraceVerdict:
    """Compare recorded, sliced and used ids of every (row, layer) of a trace, as sets.

    Reads line by line; in memory are the numbers of one pass's rows. Raises `ReplayError` for a
    file that is none, is cut off, or is of a forward pass that failed, naming the line.
    """
    file = Path(path)
    passes = replayed = native = recorded = mismatches = 0
    where = None
    for rows in _passes(file):
        passes += 1
        replayed += len(rows.valid - rows.wrong)
        native += len(rows.native)
        recorded += rows.recorded
        mismatches += rows.mismatches
        where = where or (rows.where and f"pass {passes}, {rows.where}")
    return TraceVerdict(passes, replayed, native, recorded, mismatches, where)


def trace_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines a (row, layer) of a trace. Raises as `check_trace` does."""
    for number, line in _lines(Path(path)):
        if "used" in line:
            if missing := [name for name in _FIELDS if name not in line]:
                raise _not_a_trace(Path(path), number, f"found none of {missing}")
            yield line


class _Pass:
    """What the lines of one pass add up to."""

    def __init__(self, rows: int, layers: int) -> None:
        self.expected = rows * layers
        self.lines = 0
        self.valid: set[int] = set()
        self.native: set[int] = set()
        self.wrong: set[int] = set()
        self.recorded = 0
        self.mismatches = 0
        self.where: str | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Compare one (row, layer)."""
        self.lines += 1
        if not line["valid"]:
            self.native.add(line["row"])
            return
        self.valid.add(line["row"])
        self.recorded += line["recorded"] is not None
        if (why := _difference(line)) is not None:
            self.mismatches += 1
            self.wrong.add(line["row"])
            place = f"sequence {line['sequence']}, row {line['row']}, layer {line['layer']}"
            self.where = self.where or f"{place}: {why}"

    def check_whole(self, lines: int) -> None:
        """Raise ValueError unless as many lines came as the pass has layers and rows."""
        if not self.lines == lines == self.expected:
            raise ValueError(f"expected {self.expected} lines of the pass, found {self.lines}")


def _passes(path: Path) -> Iterator[_Pass]:
    """Yield each pass when its last line was read."""
    current: _Pass | None = None
    for number, line in _lines(path):
        try:
            if current is None:
                current = _Pass(line["rows"], len(line["layers"]))
            elif "used" in line:
                current.add(line)
            elif line["error"] is None:
                current.check_whole(line["lines"])
                yield current
                current = None
            else:
                raise ValueError(f"the forward pass failed with {line['error']}")
        except (KeyError, TypeError) as error:
            raise _not_a_trace(path, number, f"found {line}") from error
        except ValueError as error:
            raise ReplayError(f"trace {path}, line {number}: {error}") from error
    if current is not None:
        raise ReplayError(
            f"trace {path} is cut off: expected {current.expected} lines of its last pass and one"
            f" that ends it, found {current.lines}"
        )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines below the first, and their numbers."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                line = json.loads(text)
                if not isinstance(line, dict) or (number == 1 and line != FORMAT):
                    raise _not_a_trace(path, number, f"found {text[:80]!r}")
                if number > 1:
                    yield number, line
    except json.JSONDecodeError as error:
        if number > 1 and not text.endswith("\n"):
            raise ReplayError(f"trace {path} is cut off in line {number}") from error
        raise _not_a_trace(path, number, f"found {text[:80]!r}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReplayError(f"trace {path}: {error}") from error
    if number == 0:
        raise _not_a_trace(path, 1, "found nothing")


def _not_a_trace(path: Path, number: int, found: str) -> ReplayError:
    return ReplayError(f"{path} is no trace: expected one of {FORMAT}, {found} in line {number}")


def _difference(line: dict[str, Any]) -> str | None:
    """Say how a line's ids differ as sets, None if they do not."""
    recorded, sliced, used = line["recorded"], line["sliced"], line["used"]
    if recorded is not None and set(recorded) != set(sliced):
        return f"recorded {recorded}, the batch has {sliced}"
    if set(sliced) != set(used):
        return f"the batch has {sliced}, the router used {used}"
    return None
