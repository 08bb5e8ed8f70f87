"""What other engines and trainers write for routed experts, and our own bytes: one file a format.

`serve_app.wire.registry` has ``decode`` and ``encode``.
"""
