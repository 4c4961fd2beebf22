"""Places in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("middleware", "middleware/lab", "calibration")
"""The folders of a checkout's packages. Revisions before 0.3.0 have no laboratory of its own."""
