"""Divergences between two models on the same tokens."""
