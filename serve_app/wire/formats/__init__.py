"""The formats, one file a peer."""
