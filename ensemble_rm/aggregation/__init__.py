"""Members' scores → one score; see `aggregator`."""
