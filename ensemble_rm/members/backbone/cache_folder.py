"""Default folder for cached features, token states and converted weights."""

from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/ensemble_rm")
