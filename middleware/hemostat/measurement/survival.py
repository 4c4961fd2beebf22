"""How long the texts of both models stay equal, estimated from the scored requests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hemostat.measurement.figures import finite
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.trajectory import Survival, SurvivalCurve, agreement
from hemostat_calibration.records import TokenRecord

REPORTED_TOKENS = (1, 4, 16, 64, 256, 1024)
"""Output tokens after which the survival is reported."""


class SurvivalFigures:
    """Three survival curves of texts that the compressed model generated without a profile.

    sampled: text drawn at temperature 1 from the whole vocabulary: the probability that two texts are still equal under
        the maximal coupling of each token; nothing is truncated.
    greedy: greedy text: the share that is still equal to the reference's greedy text.
    total_variation: any text: Π(1 − TV), between its values at the two bounds of TV.
    """

    def __init__(self) -> None:
        self._sampled = Survival()
        self._greedy = Survival()
        self._upper = Survival()
        self._lower = Survival()

    def add(self, record: TokenRecord, figures: TokenDivergence) -> None:
        if record.applied is not None or record.adapter is not None:
            return
        sampling = record.sampling
        if sampling.greedy:
            self._greedy = self._greedy.update(figures.top1_agreement.astype(np.float64))
        elif sampling.temperature == 1.0 and sampling.top_p >= 1.0 and sampling.top_k <= 0 and sampling.min_p <= 0.0:
            self._sampled = self._sampled.update(agreement(record))
        tv = figures.bounds.tv
        self._upper = self._upper.update(np.clip(1.0 - tv.lower, 0.0, 1.0))
        self._lower = self._lower.update(np.clip(1.0 - tv.upper, 0.0, 1.0))

    def report(self) -> dict[str, Any]:
        """JSON-ready; intervals are 95 %, for one look. A half-life beyond the data is None, and so is such an end."""
        found: dict[str, Any] = {}
        for name, survival in (("sampled", self._sampled), ("greedy", self._greedy)):
            if survival.requests:
                found[name] = _to_json(survival.get())
        if self._upper.requests:
            upper, lower = self._upper.get(), self._lower.get()
            found["total_variation"] = {
                "requests": upper.requests,
                "half_life_tokens": {"lower": finite(lower.half_life), "upper": finite(upper.half_life)},
                "survival": [
                    {"tokens": int(t), "lower": float(lower.survival[i]), "upper": float(upper.survival[i])}
                    for i, t in enumerate(upper.positions.tolist())
                    if t in REPORTED_TOKENS
                ],
            }
        return found

    def half_life(self) -> tuple[float, float, float] | None:
        """Of sampled text, in tokens: estimate and ends of its 95 % interval; infinite beyond the data. None without a
        request."""
        if not self._sampled.requests:
            return None
        curve = self._sampled.get()
        return curve.half_life, curve.half_life_low, curve.half_life_high


def _to_json(curve: SurvivalCurve) -> dict[str, Any]:
    return {
        "requests": curve.requests,
        "half_life_tokens": {
            "estimate": finite(curve.half_life),
            "ci95": [finite(curve.half_life_low), finite(curve.half_life_high)],
        },
        "common_prefix_tokens": {
            "estimate": finite(curve.prefix),
            "ci95": [finite(curve.prefix_low), finite(curve.prefix_high)],
            "of": curve.horizon,
        },
        "survival": [
            {
                "tokens": int(t),
                "estimate": float(curve.survival[i]),
                "ci95": [float(curve.low[i]), float(curve.high[i])],
                "requests": int(curve.at_risk[i]),
            }
            for i, t in enumerate(curve.positions.tolist())
            if t in REPORTED_TOKENS and math.isfinite(curve.survival[i])
        ],
    }
