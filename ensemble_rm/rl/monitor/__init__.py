"""The over-optimisation monitor: measures of a run, alarms, plots, and a callback for TRL."""
