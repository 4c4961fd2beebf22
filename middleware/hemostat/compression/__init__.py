"""Compressed copies of checkpoints."""
