"""Measurements behind the figures in docs; each module prints JSON lines."""
