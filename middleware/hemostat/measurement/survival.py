"""The length for which the texts of both models stay equal, estimated from the scored requests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hemostat.measurement.dependence import NO_CYCLE, Cycle, Dependence, told
from hemostat.measurement.figures import finite
from hemostat_calibration.arrays import Floats
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.trajectory import Survival, SurvivalCurve, agreement
from hemostat_calibration.records import TokenRecord

REPORTED_TOKENS = (1, 4, 16, 64, 256, 1024)
"""The numbers of output tokens after which the survival is reported."""


class _Texts:
    """The curve of one way to decode, and how much the texts depend on each other: v̂ of the share of tokens at which
    they part, whose sums the logarithm of the survival is made of.
    """

    def __init__(self, cycle: Cycle) -> None:
        self.survival = Survival()
        self._dependence = Dependence(1, cycle)

    def update(self, factors: Floats, client: bytes) -> None:
        self.survival = self.survival.update(factors)
        self._dependence.update(np.array([float((1.0 - factors).sum())]), np.array([float(len(factors))]), client)

    @property
    def inflation(self) -> float:
        """The v̂ of the texts; infinite if it is not known."""
        return self._dependence.inflation()

    def curve(self) -> SurvivalCurve:
        """Its intervals mean nothing if v̂ is not known."""
        v = self.inflation
        return self.survival.get(inflation=v if math.isfinite(v) else 1.0)


class SurvivalFigures:
    """Three survival curves of texts that the compressed model generated without a profile. cycle: of the traffic.

    sampled: text drawn at temperature 1 from the whole vocabulary: the probability that two texts are still equal under
        the maximal coupling of each token; nothing is truncated.
    greedy: greedy text: the share that is still equal to the reference's greedy text.
    total_variation: any text: Π(1 − TV), between its values at the two bounds of TV.
    """

    def __init__(self, cycle: Cycle = NO_CYCLE) -> None:
        self._sampled = _Texts(cycle)
        self._greedy = _Texts(cycle)
        self._upper = Survival()
        self._lower = Survival()

    def update(self, record: TokenRecord, figures: TokenDivergence) -> None:
        if record.applied is not None or record.adapter is not None:
            return
        sampling = record.sampling
        if sampling.greedy:
            self._greedy.update(figures.top1_agreement.astype(np.float64), record.client)
        elif sampling.temperature == 1.0 and sampling.top_p >= 1.0 and sampling.top_k <= 0 and sampling.min_p <= 0.0:
            self._sampled.update(agreement(record), record.client)
        tv = figures.bounds.tv
        self._upper = self._upper.update(np.clip(1.0 - tv.lower, 0.0, 1.0))
        self._lower = self._lower.update(np.clip(1.0 - tv.upper, 0.0, 1.0))

    def report(self) -> dict[str, Any]:
        """JSON-ready; intervals are 95 %, for one look, of the effective requests, and without ends where v̂ is not
        known. A half-life beyond the data is None, and so is such an end."""
        result: dict[str, Any] = {}
        for name, texts in (("sampled", self._sampled), ("greedy", self._greedy)):
            if texts.survival.requests:
                result[name] = _to_json(texts)
        if self._upper.requests:
            upper, lower = self._upper.get(), self._lower.get()
            result["total_variation"] = {
                "requests": upper.requests,
                "half_life_tokens": {"lower": finite(lower.half_life), "upper": finite(upper.half_life)},
                "survival": [
                    {"tokens": int(t), "lower": float(lower.survival[i]), "upper": float(upper.survival[i])}
                    for i, t in enumerate(upper.positions.tolist())
                    if t in REPORTED_TOKENS
                ],
            }
        return result

    def half_life(self) -> dict[str, float]:
        """Returns the half-life of sampled text, in tokens: "mean", and "low" and "high" of its 95 % interval if v̂ is
        known; infinite beyond the data. It is empty without a request.
        """
        if not self._sampled.survival.requests:
            return {}
        curve = self._sampled.curve()
        ends = {"low": curve.half_life_low, "high": curve.half_life_high}
        return {"mean": curve.half_life, **(ends if math.isfinite(self._sampled.inflation) else {})}


def _to_json(texts: _Texts) -> dict[str, Any]:
    curve, known = texts.curve(), math.isfinite(texts.inflation)

    def ends(low: float, high: float) -> list[float | None]:
        return [finite(low), finite(high)] if known else [None, None]

    return {
        "requests": curve.requests,
        **told(curve.requests, texts.inflation),
        "half_life_tokens": {
            "estimate": finite(curve.half_life),
            "ci95": ends(curve.half_life_low, curve.half_life_high),
        },
        "common_prefix_tokens": {
            "estimate": finite(curve.prefix),
            "ci95": ends(curve.prefix_low, curve.prefix_high),
            "of": curve.horizon,
        },
        "survival": [
            {
                "tokens": int(t),
                "estimate": float(curve.survival[i]),
                "ci95": ends(float(curve.low[i]), float(curve.high[i])),
                "requests": int(curve.at_risk[i]),
            }
            for i, t in enumerate(curve.positions.tolist())
            if t in REPORTED_TOKENS and math.isfinite(curve.survival[i])
        ],
    }
