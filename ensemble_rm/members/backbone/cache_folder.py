"""Where features, token states and converted weights are cached where no folder is given."""

from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/ensemble_rm")
