"""What to ask next: pairs chosen for judgment, each with a known probability."""
