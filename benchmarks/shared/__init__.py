"""What several benchmarks share: options, figures, data parts, peers."""
