"""What a benchmark prints: one JSON object a line, and nothing else on standard output."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any


def emit(line: Mapping[str, Any]) -> None:
    """Print one line, whatever else goes to standard error meanwhile."""
    print(json.dumps(line), file=sys.__stdout__, flush=True)


@contextmanager
def only_lines() -> Iterator[None]:
    """Send what others print to standard error: Ray prints warnings of its raylets."""
    with redirect_stdout(sys.stderr):
        yield
