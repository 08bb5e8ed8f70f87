"""The command ``r3serve``; one module a command or group of commands."""

from serve_app.cli.command import main

__all__ = ["main"]
