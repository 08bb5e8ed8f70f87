"""The expert store: who owns the bytes of every record, and for how long."""
