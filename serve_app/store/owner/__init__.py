"""The side that owns records: the shard, what it keeps, and who finds it."""
