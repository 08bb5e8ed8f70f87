"""Composed Serve applications. No logic: builders and their config files."""
