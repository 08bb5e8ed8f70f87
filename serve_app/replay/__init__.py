"""Recorded routes in a training forward: checked against the model, then forced in its routers."""

from serve_app.replay.context import replay_routing
from serve_app.replay.trace import Trace
from serve_app.replay.verdict import TraceVerdict, check_trace

__all__ = ["Trace", "TraceVerdict", "check_trace", "replay_routing"]
