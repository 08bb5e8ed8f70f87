"""What the benchmarks share: clusters, loads, clocks, lines."""
