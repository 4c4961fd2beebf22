"""Calibration profiles: their format, families, and how they change logits."""
