"""Figures of distances that were computed exactly, over the whole vocabulary, on copies of both models."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.divergence.bounds import Bounds, Interval
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.records import ExactDistances


def of_distances(distances: ExactDistances) -> TokenDivergence:
    """Returns the distances in the form of a record's figures; NaN is what was not computed. A KL a little below 0,
    from rounding, is 0.

    >>> distances = ExactDistances(kl=np.array([0.3, np.inf]), tv=np.array([0.2, 1.0]), top1=np.array([True, False]))
    >>> figures = of_distances(distances)
    >>> figures.bound, figures.kl_rc.tolist(), figures.js.tolist()
    ('exact', [0.3, inf], [nan, nan])
    """
    kl = np.maximum(distances.kl, 0.0)
    unknown = np.full(len(kl), np.nan)
    nothing = Interval(unknown, unknown)
    return TokenDivergence(
        bound="exact",
        kl_rc=kl,
        kl_cr=unknown,
        js=unknown,
        tv=distances.tv,
        covered_reference=unknown,
        covered_compressed=unknown,
        top1_agreement=distances.top1,
        delta_log_likelihood=unknown,
        delta_p=unknown,
        entropy_reference=unknown,
        entropy_compressed=unknown,
        estimate_rc=kl,
        estimate_cr=unknown,
        estimate_js=unknown,
        estimate_tv=distances.tv,
        recovered=np.zeros(len(kl), dtype=np.bool_),
        bounds=Bounds(Interval(kl, kl), nothing, nothing, Interval(distances.tv, distances.tv), 0.0),
        known=np.ones(len(kl), dtype=np.bool_),
        top1_known=np.ones(len(kl), dtype=np.bool_),
    )
