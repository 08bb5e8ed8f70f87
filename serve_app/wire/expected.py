"""The public door to what a caller says of a payload before it is read."""

from serve_app.wire.payloads.expected import Expected

__all__ = ["Expected"]
