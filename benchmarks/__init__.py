"""Benchmarks: one script per claim, with its peer in the same run."""
