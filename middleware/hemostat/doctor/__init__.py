"""`hemostat doctor`: the offline report on a compressed model and its reference."""

from __future__ import annotations

from hemostat.doctor.main import run
from hemostat.doctor.options import DoctorOptions

__all__ = ["DoctorOptions", "run"]
