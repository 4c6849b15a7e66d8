"""Numbered versions of an ensemble and its calibrations in a folder, one of them current."""
