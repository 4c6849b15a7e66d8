"""Tables and pictures of how good a reward is."""
