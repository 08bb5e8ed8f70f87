"""Structured logs: one event a line, its fields by name."""

import json
import logging
import sys

Field = str | int | float | None


def log_event(event: str, **fields: Field) -> None:
    """Log one line. Keys in it are shortened by the caller: a whole key is the right to read.

    In a replica Serve's own logger takes it and adds deployment, replica and request; with its
    JSON encoding the fields are the line's ``r3serve``. Elsewhere the line is JSON on stderr.
    """
    told = {name: value for name, value in fields.items() if value is not None}
    text = " ".join(f"{name}={value}" for name, value in told.items())
    _logger().info("%s %s", event, text, extra={"r3serve": {"event": event, **told}})


def _logger() -> logging.Logger:
    serve = logging.getLogger("ray.serve")
    if serve.handlers:
        return serve
    own = logging.getLogger("r3serve.events")
    if not own.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Json())
        own.addHandler(handler)
        own.setLevel(logging.INFO)
        own.propagate = False
    return own


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "r3serve", {})
        return json.dumps({"at": self.formatTime(record), **fields})
