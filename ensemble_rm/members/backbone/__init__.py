"""Backbones: checkpoints, trunks, features and token states."""
