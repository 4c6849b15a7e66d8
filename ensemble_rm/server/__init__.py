"""The reward server: an ensemble over HTTP, in its own and in other servers' wire formats."""
