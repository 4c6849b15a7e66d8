"""Throughput, latency and reliability of the reward server."""
