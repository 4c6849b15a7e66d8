"""Members that other servers run: addresses, wire formats, tries, one scorer."""
