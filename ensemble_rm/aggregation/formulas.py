"""The names of `ensemble_rm.arrays`, until every module imports them from there."""

from ensemble_rm.arrays import Floats, mean_of_present

__all__ = ["Floats", "mean_of_present"]
