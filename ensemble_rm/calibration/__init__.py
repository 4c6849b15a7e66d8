"""Margins and judgments → probabilities."""
