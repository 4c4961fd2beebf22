"""The report's figures from a record of two top-K lists."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hemostat_calibration.divergence.bounds import bounds
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.records import TokenRecord
from hemostat_lab.doctor.pair import ESTIMATE, FLOOR, UPPER, Floats


def figures_of(record: TokenRecord) -> Mapping[str, Floats]:
    """Lower bounds, upper bounds and estimates of a validated record, float64 [T] each; see `pair`."""
    estimates, certain = divergence(record), bounds(record)
    return {
        **{name: getattr(certain, name).lower for name in ("kl_rc", "kl_cr", "js", "tv")},
        **{name + UPPER: getattr(certain, name).upper for name in ("kl_rc", "kl_cr", "js", "tv")},
        "kl_rc" + ESTIMATE: estimates.estimate_rc,
        "kl_cr" + ESTIMATE: estimates.estimate_cr,
        "entropy_r": estimates.entropy_reference,
        "entropy_c": estimates.entropy_compressed,
        "logp_r": record.reference_emitted,
        "logp_c": record.compressed_emitted,
        "same_top": estimates.top1_agreement.astype(np.float64),
        FLOOR: np.full(record.tokens, np.nan),
    }
