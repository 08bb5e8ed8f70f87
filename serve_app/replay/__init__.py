"""Recorded routes in a training forward: checked against the model, then forced in its routers."""

from serve_app.replay.context import replay_routing

__all__ = ["replay_routing"]
