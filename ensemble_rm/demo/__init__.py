"""The demo: data that the project makes itself, and the run over it."""
