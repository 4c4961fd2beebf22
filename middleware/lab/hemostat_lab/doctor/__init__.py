"""`hemostat doctor`: the offline report on a compressed model and its reference."""

from __future__ import annotations

from hemostat_lab.doctor.main import run
from hemostat_lab.doctor.options import DoctorOptions

__all__ = ["DoctorOptions", "run"]
