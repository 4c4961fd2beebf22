"""The divergences of r and the recovered ĉ by definition, in numpy; the product computes them with torch."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Floats, Ids, Singles
from hemostat_calibration.records import RecoveredDivergence
from hemostat_calibration.state_recovery import StateRecovery, observed_error


def variances(recovery: StateRecovery, rows: Singles, origin: Singles) -> Singles:
    """Returns (w − w₀)ᵀ P (w − w₀), float32 [n], of rows w, float32 [n, d]; w₀: `origin`, float32 [d]."""
    result: Singles = np.square((rows - origin) @ recovery.factor).sum(axis=1)
    return result


def compare(log_r: Floats, log_c: Floats, of_rows: Singles, ids: Ids, logprobs: Floats) -> RecoveredDivergence:
    """Returns the divergences of r and ĉ.

    log_r, log_c: float64 [T, V], log-probabilities of r and ĉ. of_rows: `variances` of all rows of W, [V]. ids,
    logprobs: [T, K], the compressed side's candidates as the engine reported them.
    """
    r, c = np.exp(log_r), np.exp(log_c)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mean = np.logaddexp(log_r, log_c) - np.log(2.0)
        kl_rc = np.where(r > 0.0, r * (log_r - log_c), 0.0).sum(axis=1)
        kl_cr = np.where(c > 0.0, c * (log_c - log_r), 0.0).sum(axis=1)
        js = np.where(r > 0.0, r * (log_r - log_mean), 0.0) + np.where(c > 0.0, c * (log_c - log_mean), 0.0)
        entropy = -np.where(c > 0.0, c * log_c, 0.0).sum(axis=1)
    return RecoveredDivergence(
        kl_rc=kl_rc,
        kl_cr=kl_cr,
        js=0.5 * js.sum(axis=1),
        tv=np.minimum(0.5 * np.abs(r - c).sum(axis=1), 1.0),
        entropy=entropy,
        predicted=0.5 * c @ of_rows.astype(np.float64),
        observed=observed_error(ids, logprobs, np.take_along_axis(log_c, np.maximum(ids, 0).astype(np.int64), axis=1)),
    )
