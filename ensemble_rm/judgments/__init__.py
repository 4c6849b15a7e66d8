"""Human judgments: the append-only store, imports, votes, agreement among annotators."""
