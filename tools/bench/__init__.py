"""What the benchmarks in ``tools/`` share."""
