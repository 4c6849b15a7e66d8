"""Preference pairs → trained members: losses, seeds, loops, resume; see `train`."""
