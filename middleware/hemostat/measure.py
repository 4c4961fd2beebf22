"""What has been measured so far: estimates and histograms over scored requests, constant in memory.

The unit of every interval is the request: tokens of one request are correlated.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.floor import MODELS
from hemostat_calibration.divergence import TokenDivergence, calibrated, divergence, gain
from hemostat_calibration.profile import CalibrationProfile
from hemostat_calibration.records import Arm, TokenRecord
from hemostat_calibration.streaming import Histogram, RatioEstimate

KL_EDGES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TV_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
VERSIONS_KEPT = 16
"""Profiles whose figures are kept apart; the longest unseen one goes."""

STAGES = ("raw", "calibrated")
DIRECTIONS = ("reference_compressed", "compressed_reference")
"""Of KL(first‖second)."""

FIGURES = {
    "kl_nats": "kl_rc",
    "kl_nats_estimate": "estimate_rc",
    "reverse_kl_nats": "kl_cr",
    "reverse_kl_nats_estimate": "estimate_cr",
    "js_nats": "js",
    "total_variation": "tv",
    "top1_agreement": "top1_agreement",
    "covered_mass": "covered_compressed",
    "covered_mass_reference": "covered_reference",
    "delta_log_likelihood_nats": "delta_log_likelihood",
    "entropy_compressed_nats": "entropy_compressed",
    "entropy_reference_nats": "entropy_reference",
}
"""Name in the report -> field of TokenDivergence."""
SCALARS = ("total_variation", "top1_agreement", "covered_mass")
"""Figures that the report gives as a bare number, their interval beside it."""
EXCESS = ("kl_nats", "reverse_kl_nats", "js_nats", "total_variation")
"""Figures that are also told as excess over the noise floor."""
INFINITE = ("kl_nats", "reverse_kl_nats")
"""Figures that may be infinite at a token; such tokens are counted beside the mean of the others."""


class StageFigures:
    """Ratio estimates of every figure, over the requests of one stage."""

    def __init__(self) -> None:
        self._estimates = {name: RatioEstimate() for name in FIGURES}
        self._infinite = dict.fromkeys(INFINITE, 0)
        self._bound = "exact"
        self.requests = 0
        self.tokens = 0

    def add(self, figures: TokenDivergence) -> None:
        self.requests += 1
        self.tokens += len(figures.kl_rc)
        if figures.bound == "lower":
            self._bound = "lower"
        for name, attribute in FIGURES.items():
            values = np.asarray(getattr(figures, attribute), dtype=np.float64)
            # NaN is "not available" (a greedy request has no sampled-token estimate), infinity has no mean.
            finite = np.isfinite(values)
            tokens = int(finite.sum())
            if tokens:
                total = float(values.sum() if tokens == len(values) else values[finite].sum())
                self._estimates[name] = self._estimates[name].update(total, tokens)
            if tokens < len(values) and name in INFINITE:
                self._infinite[name] += int(np.isinf(values).sum())

    def summary(self) -> dict[str, Any]:
        """Each figure with its interval, or None where nothing was measured. JSON-ready."""
        found: dict[str, Any] = {"requests": self.requests, "tokens": self.tokens, "ci95": {}}
        for name, estimate in self._estimates.items():
            figure = interval(estimate)
            if name in SCALARS:
                found[name], found["ci95"][name] = figure["estimate"], figure["ci95"]
            else:
                found[name] = figure
        for name in ("kl_nats", "reverse_kl_nats", "js_nats"):
            found[name]["bound"] = self._bound
        for name in ("kl_nats_estimate", "reverse_kl_nats_estimate"):
            found[name]["bound"] = "exact" if self._bound == "exact" else "estimate"
        for name, tokens in self._infinite.items():
            found[name]["infinite_tokens"] = tokens
        return found

    def mean(self, name: str) -> float | None:
        """One figure without the rest."""
        return _finite(self._estimates[name].get().mean)


def interval(estimate: RatioEstimate) -> dict[str, Any]:
    """JSON-ready: what is not there, or infinite, is None."""
    ratio = estimate.get()
    return {"estimate": _finite(ratio.mean), "ci95": [_finite(ratio.low), _finite(ratio.high)]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(slots=True)
class _After:
    """One profile: the figures after it, the raw ones of the same requests, and on held-out prompts its gain and the
    KL(r‖c) that it is a part of, both over the same tokens."""

    after: StageFigures = field(default_factory=StageFigures)
    before: StageFigures = field(default_factory=StageFigures)
    gain: RatioEstimate = field(default_factory=RatioEstimate)
    of: RatioEstimate = field(default_factory=RatioEstimate)


class Measurements:
    """Raw figures, and for every profile lately in question the figures after it and its gain."""

    def __init__(self) -> None:
        self._raw = StageFigures()
        self._after: OrderedDict[str, _After] = OrderedDict()
        # Every series is there from the start: a rate does not see what a series was born with.
        arms = [str(arm) for arm in Arm]
        staged = [(stage, arm) for stage in STAGES for arm in arms]
        self._kl = {(direction, *key): Histogram(KL_EDGES) for direction in DIRECTIONS for key in staged}
        self._tv = {key: Histogram(TV_EDGES) for key in staged}
        self._top1 = dict.fromkeys(staged, 0)
        self._scored = dict.fromkeys(arms, 0)
        self._places: dict[tuple[str, str], tuple[int, float]] = {}
        self._floor = {model: StageFigures() for model in MODELS}
        self.tokens = 0

    def observe(
        self,
        record: TokenRecord,
        profile: CalibrationProfile | None,
        served: CalibrationProfile | None,
        *,
        judging: bool = True,
    ) -> TokenDivergence:
        """Add one record; `profile` is the one that the calibrated stage is about, `served` the one that was applied.

        judging: the prompt is held out. Gains are of those only: on what a profile learned from it looks too good.
        Returns the raw figures.
        """
        raw = divergence(record, served)
        after = raw if profile is None else calibrated(record, profile, served)
        won_back = None if profile is None else gain(record, profile)
        # All is computed before anything is added, so that a record counts in every figure or in none.
        arm = str(record.arm)
        self.tokens += record.tokens
        self._scored[arm] += record.tokens
        self._raw.add(raw)
        tokens, nats = self._places.get((record.route, record.label), (0, 0.0))
        finite = raw.kl_rc[np.isfinite(raw.kl_rc)]
        self._places[record.route, record.label] = (tokens + len(finite), nats + float(finite.sum()))
        self._expose("raw", arm, raw)
        self._expose("calibrated", arm, after)
        if profile is not None and won_back is not None:
            stage = self._after.pop(profile.version, None) or _After()
            stage.after.add(after)
            stage.before.add(raw)
            both = won_back.exact & np.isfinite(raw.estimate_rc)
            if judging and both.any():
                stage.gain = stage.gain.update(float(won_back.lower[both].sum()), int(both.sum()))
                stage.of = stage.of.update(float(raw.estimate_rc[both].sum()), int(both.sum()))
            self._after[profile.version] = stage
            while len(self._after) > VERSIONS_KEPT:
                self._after.popitem(last=False)
        return raw

    def observe_floor(self, model: str, record: TokenRecord) -> None:
        """Add a record in which `model` (of `floor.MODELS`) stands on both sides."""
        self._floor[model].add(divergence(record))

    def floor(self) -> dict[str, Any]:
        """By model, how far it is from itself: the figures that no compression explains."""
        return {model: figures.summary() for model, figures in self._floor.items() if figures.requests}

    def excess(self) -> dict[str, Any]:
        """Headline figures over the noise floor: the raw figure less both models' own, which to second order add up.
        A figure is absent until both floors are known."""
        found: dict[str, Any] = {}
        for name in EXCESS:
            raw = self._raw.mean(name)
            floors = [figures.mean(name) for figures in self._floor.values()]
            if raw is not None and None not in floors:
                noise = float(sum(value for value in floors if value is not None))
                found[name] = {"estimate": raw - noise, "floor": noise}
        return found

    def summary(self, version: str | None) -> dict[str, Any]:
        """The report's `raw` (None) or `calibrated` part; the raw one while a profile has not been measured."""
        stage = self._after.get(version or "")
        if stage is None:
            return self._raw.summary()
        before = stage.before.summary()
        same = ("kl_nats", "kl_nats_estimate", "total_variation", "top1_agreement", "covered_mass")
        return {**stage.after.summary(), "raw_same_requests": {name: before[name] for name in same}}

    def recovered(self, version: str | None) -> float | None:
        """Gain over KL(r‖c), both exact or unbiased and over the same tokens; None while there is nothing to say."""
        stage = self._after.get(version or "")
        if stage is None:
            return None
        won, of = stage.gain.get().mean, stage.of.get().mean
        return won / of if of > 0.0 else None

    def gained(self, version: str | None) -> dict[str, Any] | None:
        """KL(r‖c) − KL(r‖c') in nats where it is known exactly, with its interval; JSON-ready."""
        stage = self._after.get(version or "")
        return None if stage is None else {**interval(stage.gain), "requests": stage.gain.requests, "bound": "exact"}

    def _expose(self, stage: str, arm: str, figures: TokenDivergence) -> None:
        for direction, values in zip(DIRECTIONS, (figures.kl_rc, figures.kl_cr), strict=True):
            self._kl[direction, stage, arm] = self._kl[direction, stage, arm].update(values)
        self._tv[stage, arm] = self._tv[stage, arm].update(figures.tv)
        self._top1[stage, arm] += int(figures.top1_agreement.sum())

    def histograms(
        self,
    ) -> Iterator[tuple[str, str, tuple[str, ...], tuple[float, ...], list[tuple[tuple[str, ...], list[int], float]]]]:
        """name, help, label names, bucket edges, (label values, counts, sum)."""
        yield (
            "hemostat_token_kl_nats",
            "KL divergence per token between the two models' distributions, nats; a lower bound from the top ids.",
            ("direction", "stage", "arm"),
            KL_EDGES,
            [(key, list(h.counts), h.total) for key, h in self._kl.items()],
        )
        yield (
            "hemostat_token_total_variation",
            "Total variation per token between the two models' distributions; a lower bound from the top ids.",
            ("stage", "arm"),
            TV_EDGES,
            [(key, list(h.counts), h.total) for key, h in self._tv.items()],
        )

    def counters(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        """name without `_total`, help, labels, value."""
        for arm, tokens in self._scored.items():
            yield "hemostat_scored_tokens", "Output tokens scored by both models.", {"arm": arm}, tokens
        for (route, label), (tokens, nats) in self._places.items():
            labels = {"route": route, "label": label}
            yield (
                "hemostat_kl_nats",
                "Sum of KL(reference||compressed) over tokens; divide by their number.",
                labels,
                nats,
            )
            yield "hemostat_kl_tokens", "Scored tokens with a finite KL(reference||compressed).", labels, tokens
        for (stage, arm), tokens in self._top1.items():
            text = "Scored tokens at which both models' likeliest id is the same."
            yield "hemostat_top1_agreement_tokens", text, {"stage": stage, "arm": arm}, tokens

    def gauges(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        """name, help, labels, value."""
        text = "KL divergence of a model from itself (decode or batch shape against another), nats; a lower bound."
        for model, floor in self._floor.items():
            for direction, figure in zip(DIRECTIONS, ("kl_nats", "reverse_kl_nats"), strict=True):
                nats = floor.mean(figure)
                if nats is not None:
                    labels = {"model": model, "direction": direction}
                    yield "hemostat_noise_floor_nats", text, labels, nats
        text = "Mean probability mass of each model on the ids for which both gave a value."
        for model, figure in (("compressed", "covered_mass"), ("reference", "covered_mass_reference")):
            mass = self._raw.mean(figure)
            if mass is not None:
                yield "hemostat_covered_mass_ratio", text, {"model": model}, mass
