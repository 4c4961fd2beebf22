"""Decides from held-out evidence which profile may serve which kind of request.

wealth      e-processes of the hypothesis that a mean gain is at most 0, by client
closing     the closed test over the kinds of one candidate
decisions   actions, reasons, evidence
kind_test   one running test: one profile in one kind
guard       `Guard`: all tests, the alpha that they spend, and the decisions
saving      the state as JSON bytes and back
pooled      the test over all traffic at once that `Guard` replaces
"""

from hemostat_calibration.guard.decisions import Action, Reason, Role
from hemostat_calibration.guard.pooled import (
    DEFAULT_WINDOW,
    MIN_WINDOW,
    WINDOWS_PER_PROOF,
    Decision,
    Evidence,
    GuardState,
    RunningTest,
    begin_test,
    decide,
    end_test,
    init,
    update,
    window_after_promotion,
)

__all__ = [
    "DEFAULT_WINDOW",
    "MIN_WINDOW",
    "WINDOWS_PER_PROOF",
    "Action",
    "Decision",
    "Evidence",
    "GuardState",
    "Reason",
    "Role",
    "RunningTest",
    "begin_test",
    "decide",
    "end_test",
    "init",
    "update",
    "window_after_promotion",
]
