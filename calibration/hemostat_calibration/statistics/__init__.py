"""Streaming estimators, and intervals and tests that are valid at every look."""
