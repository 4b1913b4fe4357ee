"""What the benchmarks share: starting ranks, counting traffic, printing results."""
