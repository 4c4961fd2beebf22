"""`hemostat doctor`: the offline report on a compressed model and the one it was made from."""

from __future__ import annotations

from hemostat.doctor.options import DoctorOptions
from hemostat.doctor.run import run

__all__ = ["DoctorOptions", "run"]
