"""ensemble_rm: robust, calibrated rewards from ensembles of reward models."""

__version__ = "0.1.0"
