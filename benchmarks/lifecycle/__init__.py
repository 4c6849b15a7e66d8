"""Recalibration, retraining and selection as judgments keep arriving."""
