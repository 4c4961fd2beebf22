"""How long both models would go on writing the same text, from the requests that were scored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hemostat.measurement.figures import finite
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.trajectory import Survival, SurvivalCurve, agreement
from hemostat_calibration.records import TokenRecord

TOLD = (1, 4, 16, 64, 256, 1024)
"""Output tokens after which the report tells the survival."""


class Trajectories:
    """Three survivals of what the compressed model itself wrote, without a profile.

    sampled: text drawn at temperature 1 from the whole vocabulary: the chance that two texts, coupled token by token as
        well as possible, are still equal; nothing is truncated.
    greedy: greedy text: the share that is still equal to the reference's own greedy text.
    total_variation: of any text, Π(1 − TV), as the interval that the two ends of TV's leave.
    """

    def __init__(self) -> None:
        self._sampled = Survival()
        self._greedy = Survival()
        self._most = Survival()
        self._least = Survival()

    def add(self, record: TokenRecord, figures: TokenDivergence) -> None:
        if record.applied is not None:
            return
        sampling = record.sampling
        if sampling.greedy:
            self._greedy = self._greedy.update(figures.top1_agreement.astype(np.float64))
        elif sampling.temperature == 1.0 and sampling.top_p >= 1.0 and sampling.top_k <= 0 and sampling.min_p <= 0.0:
            self._sampled = self._sampled.update(agreement(record))
        tv = figures.bounds.tv
        self._most = self._most.update(np.clip(1.0 - tv.lower, 0.0, 1.0))
        self._least = self._least.update(np.clip(1.0 - tv.upper, 0.0, 1.0))

    def report(self) -> dict[str, Any]:
        """JSON-ready; intervals are 95 %, for one look. A half-life beyond the data is None, and so is such an end."""
        found: dict[str, Any] = {}
        for name, survival in (("sampled", self._sampled), ("greedy", self._greedy)):
            if survival.requests:
                found[name] = _told(survival.get())
        if self._most.requests:
            most, least = self._most.get(), self._least.get()
            found["total_variation"] = {
                "requests": most.requests,
                "half_life_tokens": {"lower": finite(least.half_life), "upper": finite(most.half_life)},
                "survival": [
                    {"tokens": int(t), "lower": float(least.survival[i]), "upper": float(most.survival[i])}
                    for i, t in enumerate(most.positions.tolist())
                    if t in TOLD
                ],
            }
        return found

    def half_life(self) -> tuple[float, float, float] | None:
        """Of sampled text, with its interval; None before anything is known. Infinite beyond the data."""
        if not self._sampled.requests:
            return None
        curve = self._sampled.get()
        return curve.half_life, curve.half_life_low, curve.half_life_high


def _told(curve: SurvivalCurve) -> dict[str, Any]:
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
            if t in TOLD and math.isfinite(curve.survival[i])
        ],
    }
