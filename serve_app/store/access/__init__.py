"""The way from any process to the shards."""
