"""Everything measured so far: estimates and histograms over scored requests, in constant memory.

The unit of every interval is the request: tokens of one request are correlated.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.measurement.by_decoding import UNKNOWN, ByDecoding, strategy
from hemostat.measurement.by_kind import ByKind
from hemostat.measurement.by_place import ByPlace
from hemostat.measurement.conditional import ConditionalFigures
from hemostat.measurement.dependence import ALL, NO_CYCLE, Cycle, Dependence, inflation_samples
from hemostat.measurement.figures import HEADLINE, MAX_TOKENS, MODELS, RequestFigures, StageFigures
from hemostat.measurement.gains import DistanceGains, GainFigures, difference, interval
from hemostat.measurement.survival import SurvivalFigures
from hemostat.measurement.thinking import ThinkingFigures
from hemostat.metrics import names
from hemostat.metrics.samples import AnySample, HistogramSample, Sample
from hemostat_calibration.divergence.decoding import decoded_divergence
from hemostat_calibration.divergence.gain import Gain, gain
from hemostat_calibration.divergence.per_token import TokenDivergence, calibrated, divergence, of_distances
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.records import Arm, TokenRecord
from hemostat_calibration.statistics.confidence import MeanSequence
from hemostat_calibration.statistics.streaming import Histogram

KL_EDGES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TV_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_VERSIONS = 16
"""The largest number of profiles with figures of their own; the one that was not seen for the longest time is
dropped."""

STAGES = ("raw", "calibrated")
DECODING_KINDS = ("greedy", "sampled")
"""The kinds of a request's decoding: temperature 0, or any other or unknown temperature."""
DIRECTIONS = ("reference_compressed", "compressed_reference")
"""The directions of KL(first‖second)."""

EXCESS = ("kl_nats", "reverse_kl_nats", "js_nats", "kl_nats_estimate", "reverse_kl_nats_estimate")
"""The figures whose excess over the noise floor is reported, too: those that are quadratic in small differences, so
that independent noise adds up. Total variation and agreement are not: the noise of a self-comparison has no known share
of them. Upper bounds have no excess: they contain what the lists leave open, which is no noise."""
FLOOR_SHARE = 0.5
"""The share of a model's floor that is in its divergence from the other model: a self-comparison compares two noisy
computations of one model, and the raw figure has one noisy computation of each model.
"""
ARM_DIFFERENCES = ("kl_nats_estimate", "total_variation", "top1_agreement")


@dataclass(slots=True)
class Top1:
    """The share of the tokens at which both models' most likely id is the same: before a profile, after it, the change.

    All three are of the tokens where the profile's effect is known. At some of these, an id behind the candidates could
    have become the likeliest (`unproven`). They count: the others have a likely id, where models agree more often.
    """

    cycle: Cycle = NO_CYCLE
    before: MeanSequence = field(default_factory=MeanSequence)
    after: MeanSequence = field(default_factory=MeanSequence)
    change: MeanSequence = field(default_factory=MeanSequence)
    dependence: Dependence = field(init=False)
    """The dependence of the requests in these three figures."""
    tokens: int = 0
    unknown: int = 0
    """The number of tokens for which the profile's effect is not known."""
    unproven: int = 0
    """See `TokenDivergence.top1_known`."""

    def __post_init__(self) -> None:
        self.dependence = Dependence(3, self.cycle)

    def update(self, raw: TokenDivergence, after: TokenDivergence, client: bytes) -> None:
        known = after.known
        tokens = int(known.sum())
        self.unproven += int((known & ~after.top1_known).sum())
        self.unknown += len(known) - tokens
        if not tokens:
            return
        old, new = float(raw.top1_agreement[known].sum()), float(after.top1_agreement[known].sum())
        self.before, self.after = self.before.update(old, tokens), self.after.update(new, tokens)
        self.change = self.change.update(new - old, tokens)
        self.dependence.update(np.array([old, new, new - old]), np.full(3, float(tokens)), client)
        self.tokens += tokens

    def summary(self) -> dict[str, Any]:
        before, after, change = self.dependence.inflations().tolist()
        return {
            "tokens": self.tokens,
            "unknown_tokens": self.unknown,
            "unproven_tokens": self.unproven,
            "before": interval(self.before, before, 0.0, 1.0),
            "after": interval(self.after, after, 0.0, 1.0),
            "change": interval(self.change, change, -1.0, 1.0),
        }


@dataclass(slots=True)
class _After:
    """One profile: the figures after it, the raw ones of the same requests, and, on held-out units, its gain.

    Of an adapter all of them are from exact distances of held-out units."""

    after: StageFigures
    before: StageFigures
    gain: GainFigures | DistanceGains
    top1: dict[str, Top1]


class Measurements:
    """Owns the raw figures, and for every recent profile the figures after it and its gain. max_tokens: the limit of a
    request's tokens. cycle: of the traffic.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS, cycle: Cycle = NO_CYCLE) -> None:
        self._cycle = cycle
        # Every series exists from the start: PromQL's rate() ignores the value that a series begins with.
        arms = [str(arm) for arm in Arm]
        staged = [(stage, arm) for stage in STAGES for arm in arms]
        self._kl = {(direction, *key): Histogram(KL_EDGES) for direction in DIRECTIONS for key in staged}
        self._tv = {key: Histogram(TV_EDGES) for key in staged}
        self._top1 = {(*key, decoding): (0, 0) for key in staged for decoding in DECODING_KINDS}
        """The number of tokens at which the likeliest ids agree, and of those at which it is known if they do."""
        self._scored = {(arm, decoding): 0 for arm in arms for decoding in DECODING_KINDS}
        self._places: dict[tuple[str, str, str], tuple[int, float]] = {}
        self.by_kind = ByKind(cycle=cycle)
        self.by_place = ByPlace(cycle)
        self.thinking = ThinkingFigures(max_tokens, cycle)
        self.conditional = ConditionalFigures(cycle)
        """The figures of constrained records, which `update` does not take."""
        self.tokens = 0
        """The number of scored tokens."""
        self._begin_figures()

    def _begin_figures(self) -> None:
        """Makes all figures that are not of a part which has a `forget` of its own."""
        self._raw = self._figures()
        self.survival = SurvivalFigures(self._cycle)
        self._after: OrderedDict[str, _After] = OrderedDict()
        self.by_decoding = ByDecoding(self._cycle)
        self._where: dict[tuple[str, str], StageFigures] = {}
        self._served = {str(arm): self._figures() for arm in Arm}
        self._noise_floor = {model: self._figures() for model in MODELS}

    def forget(self) -> None:
        """Other models are served or compared: every figure with an interval begins anew. Counters and histograms go
        on, because a counter that goes back is a restart for Prometheus."""
        self._begin_figures()
        for part in (self.by_kind, self.by_place, self.thinking, self.conditional):
            part.forget()

    def update(
        self,
        record: TokenRecord,
        profile: CalibrationProfile | None,
        served: CalibrationProfile | None,
        *,
        held_out: bool = True,
        gain_of: Callable[[CalibrationProfile], Gain] | None = None,
        figures: TokenDivergence | None = None,
        fresh: bool = True,
        weight: float = 1.0,
    ) -> TokenDivergence:
        """Adds one record; `profile` is the one that the calibrated stage is about, `served` the one that was applied.

        held_out: nothing is learned from the prompt. Gains are measured on those only: on requests that a profile
            learned from, it looks better than it is.
        gain_of: gives the gain of a profile on the record; None: it is computed here.
        figures: `divergence(record, served)`; None: it is computed here.
        fresh: the record is an observation of its own: the first of its conversation and kind. Others count in tokens
            and histograms, not in figures with intervals.
        weight: see `ScoredRecord.weight`; the raw figures weigh by it.
        Returns the figures.
        """
        raw = divergence(record, served) if figures is None else figures
        if record.adapter is not None:
            self._update_adapted(record, raw, fresh=fresh)
            return raw
        if profile is not None and profile.changes_weights:
            # What it would have been with the adapter does not follow from the record; see `update_distances`.
            profile, adapted = None, True
        else:
            adapted = False
        after = raw if profile is None else calibrated(record, profile, served)
        gained = None
        if profile is not None and held_out:
            gained = gain(record, profile) if gain_of is None else gain_of(profile)
        decoded = strategy(record)
        drawn = None if decoded == UNKNOWN else decoded_divergence(record, raw.bounds)
        of_raw = RequestFigures(raw)
        of_after = of_raw if after is raw else RequestFigures(after)
        sums = of_raw.sums
        # All is computed before anything is added, so that a record counts in every figure or in none.
        arm, decoding = str(record.arm), "greedy" if record.sampling.greedy else "sampled"
        self.tokens += record.tokens
        self._scored[arm, decoding] += record.tokens
        place = record.route, record.label, decoded
        tokens, nats = self._places.get(place, (0, 0.0))
        finite = raw.kl_rc[np.isfinite(raw.kl_rc)]
        self._places[place] = (tokens + len(finite), nats + float(finite.sum()))
        self._expose("raw", arm, decoding, raw)
        if not adapted:
            self._expose("calibrated", arm, decoding, after)
        # What the client was served: for a treated request, the calibrated distribution.
        served_figures = of_raw if record.applied is None else of_after
        self.by_kind.update_totals(record, served_figures.tokens)
        self.by_place.update(record, of_raw, fresh=fresh)
        if not fresh:
            return raw
        self._raw.update(sums, record.client, weight)
        self.survival.update(record, raw)
        self.by_decoding.update(decoded, sums, drawn, record.client)
        if (at := (record.route, record.label)) not in self._where:
            self._where[at] = self._figures()
        self._where[at].update(sums, record.client, weight)
        self._served[arm].update(served_figures.sums, record.client)
        self.by_kind.update(record, of_raw, served_figures, profile, gained, weight)
        if profile is not None:
            stage = self._after.pop(profile.version, None) or self._begin(profile)
            stage.after.update(of_after.sums, record.client)
            stage.before.update(sums, record.client)
            stage.top1[decoding].update(raw, after, record.client)
            if gained is not None and isinstance(stage.gain, GainFigures):
                stage.gain.update(gained, raw, record.client)
            self._keep(profile.version, stage)
        return raw

    def update_part(self, record: TokenRecord, figures: TokenDivergence, *, fresh: bool) -> None:
        """Observes a record of the last tokens of an output: it counts by place alone, see `by_place`."""
        if record.adapter is None:
            self.by_place.update(record, RequestFigures(figures), fresh=fresh)

    def _update_adapted(self, record: TokenRecord, figures: TokenDivergence, *, fresh: bool) -> None:
        """Observes a record of an adapter: what was served, and nothing of the compressed model itself."""
        arm, decoding = str(record.arm), "greedy" if record.sampling.greedy else "sampled"
        self.tokens += record.tokens
        self._scored[arm, decoding] += record.tokens
        self._expose("calibrated", arm, decoding, figures)
        self.by_kind.update_totals(record, figures)
        if fresh:
            served = RequestFigures(figures)
            self._served[arm].update(served.sums, record.client)
            self.by_kind.update(record, None, served, None, None)

    def update_distances(self, record: TokenRecord, profile: CalibrationProfile | None, *, fresh: bool) -> None:
        """Observes a held-out record whose exact distances are there. profile: what serves its kind, or would; only
        what an adapter does is measured by them. fresh: as in `update`."""
        if profile is None or not profile.changes_weights or not fresh:
            return
        before, after = record.distances.get(IDENTITY), record.distances.get(profile.version)
        if before is None or after is None:
            return
        stage = self._after.pop(profile.version, None) or self._begin(profile)
        raw, adapted = of_distances(before), of_distances(after)
        stage.before.update(raw, record.client)
        stage.after.update(adapted, record.client)
        stage.top1["greedy" if record.sampling.greedy else "sampled"].update(raw, adapted, record.client)
        if isinstance(stage.gain, DistanceGains):
            stage.gain.update(before, after, record.client)
        self._keep(profile.version, stage)
        self.by_kind.update_distances(record, profile.version, before, after)

    def _keep(self, version: str, stage: _After) -> None:
        self._after[version] = stage
        while len(self._after) > MAX_VERSIONS:
            self._after.popitem(last=False)

    def _begin(self, profile: CalibrationProfile) -> _After:
        cycle, top1 = self._cycle, {decoding: Top1(self._cycle) for decoding in DECODING_KINDS}
        if profile.changes_weights:
            return _After(self._figures(), self._figures(), DistanceGains(cycle=cycle), top1)
        gain = GainFigures(2.0 * profile.clamp_nats, cycle=cycle)
        return _After(self._figures(), self._figures(), gain, top1)

    def _figures(self) -> StageFigures:
        return StageFigures(cycle=self._cycle)

    def update_noise_floor(self, model: str, record: TokenRecord) -> TokenDivergence:
        """Adds a record with `model`, of `MODELS`, on both sides; returns its figures."""
        figures = divergence(record)
        self._noise_floor[model].update(figures, record.client)
        return figures

    def noise_floor(self) -> dict[str, Any]:
        """Returns by model its divergence from itself: figures that no compression explains."""
        return {model: figures.summary() for model, figures in self._noise_floor.items() if figures.requests}

    def excess(self) -> dict[str, Any]:
        """Returns the figures of `EXCESS` over the noise floor: the raw figure minus half of each model's own, which is
        what their noise adds to it, to second order. A figure is absent until it and both floors are known."""
        # Three intervals that hold simultaneously with 95 %: each has a third of the error probability.
        part = 0.05 / (1 + len(self._noise_floor))
        result: dict[str, Any] = {}
        for name in EXCESS:
            parts = self._raw, *self._noise_floor.values()
            raw, *floors = (figures.interval(name, part) for figures in parts)
            known = all(figures.has_interval(name) for figures in parts)
            noise = FLOOR_SHARE * sum(floor.mean for floor in floors)
            if math.isnan(raw.mean - noise):
                continue
            low = raw.low - FLOOR_SHARE * sum(floor.high for floor in floors)
            high = raw.high - FLOOR_SHARE * sum(floor.low for floor in floors)
            result[name] = {
                "estimate": raw.mean - noise,
                "ci95": [low, high] if known else [None, None],
                "floor": noise,
            }
        return result

    def summary(self, version: str | None) -> dict[str, Any]:
        """Returns the report's `raw` (None) or `calibrated` part; the raw one while a profile has not been measured."""
        stage = self._after.get(version or "")
        if stage is None:
            return self._raw.summary()
        before = stage.before.summary()
        same = ("kl_nats", "kl_nats_estimate", "total_variation", "top1_agreement", "covered_mass")
        return {
            **stage.after.summary(),
            "raw_same_requests": {name: before[name] for name in same},
            "top1_by_decoding": {decoding: top1.summary() for decoding, top1 in stage.top1.items()},
        }

    def recovered(self, version: str | None) -> dict[str, Any] | None:
        """Returns the gain over KL(r‖c), the first exact, the second unbiased, over the same tokens; None if nothing
        was measured. JSON-ready."""
        stage = self._after.get(version or "")
        return None if stage is None else stage.gain.recovered()

    def gained(self, version: str | None) -> dict[str, Any] | None:
        """Returns KL(r‖c) − KL(r‖c') in nats where it is known exactly, by token and by request; JSON-ready."""
        stage = self._after.get(version or "")
        return None if stage is None else stage.gain.gained()

    def where(self) -> list[dict[str, Any]]:
        """Returns the raw figures by route and label."""
        return [{"route": r, "label": n, **f.summary()} for (r, n), f in self._where.items()]

    def arms(self) -> dict[str, Any]:
        """Returns what clients were served, by arm, and treated minus control. Requests are assigned at random, so the
        difference is the effect of calibration. For KL the estimate without truncation bias is compared: a difference
        of two bounds would prove nothing.
        """
        treated, control = self._served[Arm.TREATED], self._served[Arm.CONTROL]
        differences = {name: difference(treated, control, name) for name in ARM_DIFFERENCES}
        arms = {arm: figures.summary() for arm, figures in self._served.items() if figures.requests}
        return {**arms, "treated_minus_control": differences}

    def _expose(self, stage: str, arm: str, decoding: str, figures: TokenDivergence) -> None:
        for direction, values in zip(DIRECTIONS, (figures.kl_rc, figures.kl_cr), strict=True):
            self._kl[direction, stage, arm] = self._kl[direction, stage, arm].update(values)
        self._tv[stage, arm] = self._tv[stage, arm].update(figures.tv)
        agree, known = self._top1[stage, arm, decoding]
        agree += int((figures.top1_agreement & figures.known).sum())
        self._top1[stage, arm, decoding] = agree, known + int(figures.known.sum())

    def samples(self) -> Iterator[AnySample]:
        for key, histogram in self._kl.items():
            yield HistogramSample(names.TOKEN_KL_NATS, key, KL_EDGES, list(histogram.counts), histogram.total)
        for pair, histogram in self._tv.items():
            yield HistogramSample(names.TOKEN_TOTAL_VARIATION, pair, TV_EDGES, list(histogram.counts), histogram.total)
        for labels, tokens in self._scored.items():
            yield Sample(names.SCORED_TOKENS, labels, tokens)
        for place, (tokens, nats) in self._places.items():
            yield Sample(names.KL_NATS, place, nats)
            yield Sample(names.KL_TOKENS, place, tokens)
        for key, (agree, known) in self._top1.items():
            yield Sample(names.TOP1_AGREEMENT_TOKENS, key, agree)
            yield Sample(names.TOP1_KNOWN_TOKENS, key, known)
        stages = {"raw": {name: self._raw.figure(name) for name in HEADLINE}, "excess": self.excess()}
        for stage, figures in stages.items():
            for name, figure in figures.items():
                ends = {"mean": figure["estimate"], "low": figure["ci95"][0], "high": figure["ci95"][1]}
                for edge, value in ends.items():
                    if value is not None:
                        yield Sample(names.DIVERGENCE, (name, stage, edge), value)
        for name in HEADLINE:
            yield from inflation_samples(ALL, name, self._raw.requests, self._raw.inflation(name))
        yield from self.by_kind.samples()
        yield from self.by_place.samples()
        yield from self.thinking.samples()
        yield from self.conditional.samples()
        for edge, value in self.survival.half_life().items():
            yield Sample(names.SURVIVAL_HALF_LIFE_TOKENS, (edge,), value)
        for model, floor in self._noise_floor.items():
            for direction, name in zip(DIRECTIONS, ("kl_nats", "reverse_kl_nats"), strict=True):
                mean = floor.mean(name)
                if mean is not None:
                    yield Sample(names.NOISE_FLOOR_NATS, (model, direction), mean)
        for model, name in (("compressed", "covered_mass"), ("reference", "covered_mass_reference")):
            mass = self._raw.mean(name)
            if mass is not None:
                yield Sample(names.COVERED_MASS_RATIO, (model,), mass)
        recovered = self._raw.mean("recovered_share")
        if recovered is not None:
            yield Sample(names.RECOVERED_DISTRIBUTION_RATIO, (), recovered)
