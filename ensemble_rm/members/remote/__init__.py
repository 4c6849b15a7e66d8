"""Members that other servers run: addresses, protocols, retries, one scorer."""
