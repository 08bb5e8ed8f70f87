"""State dicts on their way from a trainer to every replica."""
