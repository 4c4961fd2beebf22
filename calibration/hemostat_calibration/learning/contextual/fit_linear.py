"""Fit the linear map: reduced-rank ridge regression on the sums, its penalty chosen by KL itself on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

from hemostat_calibration.learning.contextual import regression
from hemostat_calibration.learning.contextual.choose import (
    SCALES,
    ProfileLimits,
    best_map_and_scale,
    exact_gains,
    mean_by_prompt,
)
from hemostat_calibration.learning.contextual.examples import HiddenExamples
from hemostat_calibration.learning.contextual.fitter import Candidate, Progress, Variant
from hemostat_calibration.learning.contextual.maps import linear_map, scaled

_STRONGER = (1.0, 10**0.5, 10.0, 10**1.5)
"""The penalties tried, times the one that the squared error prefers: KL itself prefers a stronger one."""


class LinearFitter:
    """Fits a map to hidden states. ranks: the ranks that it may have."""

    def __init__(self, ranks: Sequence[int], limits: ProfileLimits) -> None:
        self._ranks = ranks
        self._limits = limits

    def fit(self, examples: HiddenExamples, progress: Progress) -> Candidate | None:
        """Returns the linear map that gains most; None unless it gains more than one standard error across folds.

        Without rows the gain is taken from the cross-validation on the sums, which is of second order.
        """
        progress("linear", 0.0)
        moments = examples.moments
        result = regression.choose(moments, self._ranks)
        if result is None or result.gain <= result.error:
            return None
        if not examples.rows:
            return Candidate(
                variant=Variant.LINEAR,
                penalty=result.penalty,
                gain=result.gain,
                error=result.error,
                refit=lambda: linear_map(result),
            )
        whole, rank, out = regression.total(moments), len(result.read), examples.held_out_fold
        penalties = [result.penalty * stronger for stronger in _STRONGER]
        starts = regression.fitted(whole - moments[out], penalties, rank)
        maps = [linear_map(start) for start in starts]
        gains = exact_gains(examples.basis, examples.held_out_rows, maps, self._limits)
        chosen, scale = best_map_and_scale(gains)
        gain, error = mean_by_prompt(gains[chosen, scale], examples.prompt[examples.held_out])
        from_all = regression.fitted(whole, penalties[chosen : chosen + 1], rank)[0]
        return Candidate(
            variant=Variant.LINEAR,
            penalty=from_all.penalty,
            gain=gain,
            error=error,
            refit=lambda: scaled(linear_map(from_all), float(SCALES[scale])),
        )
