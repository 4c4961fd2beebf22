"""Divergences from whole distributions, to compare what top-K lists give with."""

from __future__ import annotations

import math

import numpy as np


def exact(log_r, log_c):
    """Full-vocabulary figures; zeros allowed."""
    r, c = np.exp(log_r), np.exp(log_c)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_m = np.log(r + c) - np.log(2.0)
        return {
            "kl_rc": np.where(r > 0, r * (log_r - log_c), 0.0).sum(-1),
            "kl_cr": np.where(c > 0, c * (log_c - log_r), 0.0).sum(-1),
            "js": 0.5 * (np.where(r > 0, r * (log_r - log_m), 0) + np.where(c > 0, c * (log_c - log_m), 0)).sum(-1),
            "tv": 0.5 * np.abs(r - c).sum(-1),
        }


def largest_ratio(truth):
    """The floor that holds for this pair."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(truth.reference - truth.compressed)
    return math.exp(-np.nanmax(apart)) * (1.0 - 1e-9)
