"""One engine's rollouts: from a request to the key of its record."""
