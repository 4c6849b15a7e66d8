"""Judged pairs as dated margins: windows of judgments, and their stored scores."""
