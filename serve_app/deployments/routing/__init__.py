"""Which replica gets a call."""
