"""Drift of three kinds, told apart: labelled, unlabelled, raters."""
