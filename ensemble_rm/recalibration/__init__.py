"""Calibrations that stay true while judgments keep arriving."""
