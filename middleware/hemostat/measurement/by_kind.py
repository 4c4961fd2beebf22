"""The figures of each kind of traffic: raw (of the compressed model itself, so without the records of an adapter), what
its arms were served, and what a profile gained in it.

Kinds are bounded by the caller, which follows some and names the others `REST_KIND`; those that are followed no more
are dropped here after `MAX_KINDS`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.ipc.messages import REST_KIND
from hemostat.measurement.dependence import NO_CYCLE, Cycle, inflation_samples
from hemostat.measurement.figures import RequestFigures, StageFigures
from hemostat.measurement.gains import DistanceGains, GainFigures, difference
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Arm, ExactDistances, TokenRecord

MAX_KINDS = 64
MAX_VERSIONS = 4
"""The largest number of profiles with a gain in one kind; the one that was not seen for the longest time is dropped."""
FIGURES_BY_KIND = (
    "kl_nats",
    "kl_nats_estimate",
    "js_nats",
    "total_variation",
    "total_variation_upper",
    "top1_agreement",
)
DIFFERENCES = ("kl_nats_estimate", "total_variation", "top1_agreement")
ASSIGNED = (Arm.CONTROL, Arm.TREATED)


@dataclass(slots=True)
class _Kind:
    cycle: Cycle
    raw: StageFigures = field(init=False)
    served: dict[Arm, StageFigures] = field(init=False)
    gains: OrderedDict[str, GainFigures | DistanceGains] = field(default_factory=OrderedDict)
    """The gains by version, the one that was seen last at the end."""
    totals: dict[str, tuple[int, float]] = field(default_factory=lambda: {str(arm): (0, 0.0) for arm in Arm})
    """The number of tokens with a finite KL, and the sum of their KL, of what was served, by arm. All records count."""

    def __post_init__(self) -> None:
        self.raw = StageFigures(FIGURES_BY_KIND, self.cycle)
        self.served = {arm: StageFigures(FIGURES_BY_KIND, self.cycle) for arm in ASSIGNED}

    def latest(self) -> tuple[str | None, GainFigures | DistanceGains | None]:
        version = next(reversed(self.gains), None)
        return version, None if version is None else self.gains[version]

    def put(self, version: str, figures: GainFigures | DistanceGains) -> None:
        """Puts the figures of a version as the one that was seen last."""
        self.gains.pop(version, None)
        self.gains[version] = figures
        if len(self.gains) > MAX_VERSIONS:
            self.gains.popitem(last=False)


@dataclass(frozen=True, slots=True)
class KindMetrics:
    """The names of the metrics that the figures are exported as."""

    kl_nats: str
    kl_tokens: str
    gain_nats: str
    recovered_ratio: str | None
    draft_acceptance: str | None
    """None, as for the one before: it is not exported."""


KIND_METRICS = KindMetrics(
    names.KIND_KL_NATS,
    names.KIND_KL_TOKENS,
    names.KIND_GAIN_NATS,
    names.RECOVERED_DIVERGENCE_RATIO,
    names.KIND_DRAFT_ACCEPTANCE_RATIO,
)
CONDITIONAL_METRICS = KindMetrics(
    names.CONDITIONAL_KIND_KL_NATS,
    names.CONDITIONAL_KIND_KL_TOKENS,
    names.CONDITIONAL_KIND_GAIN_NATS,
    None,
    None,
)


class ByKind:
    """The figures of all kinds. metrics: the metrics that its figures are exported as. cycle: of the traffic."""

    def __init__(self, metrics: KindMetrics = KIND_METRICS, cycle: Cycle = NO_CYCLE) -> None:
        self._cycle = cycle
        self._metrics = metrics
        self._kinds: OrderedDict[str, _Kind] = OrderedDict()

    def update_totals(self, record: TokenRecord, served: TokenDivergence) -> None:
        """Counts a record of any sort. served: the figures of what the client was served."""
        name, arm = record.kind or REST_KIND, str(record.arm)
        kind = self._kinds.pop(name, None) or _Kind(self._cycle)
        self._kinds[name] = kind
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        tokens, nats = kind.totals[arm]
        finite = served.kl_rc[np.isfinite(served.kl_rc)]
        kind.totals[arm] = (tokens + len(finite), nats + float(finite.sum()))

    def update(
        self,
        record: TokenRecord,
        raw: RequestFigures | None,
        served: RequestFigures,
        profile: CalibrationProfile | None,
        gain: Gain | None,
        weight: float = 1.0,
    ) -> None:
        """Adds a record that is an observation of its own, after `update_totals`. raw: None if it is of an adapter.
        profile, gain: of the calibrated stage. weight: see `ScoredRecord.weight`."""
        kind = self._kinds[record.kind or REST_KIND]
        if raw is not None:
            kind.raw.update(raw.sums, record.client, weight)
        if record.arm in kind.served:
            kind.served[record.arm].update(served.sums, record.client)
        if raw is None or profile is None or gain is None:
            return
        figures = kind.gains.get(profile.version)
        if not isinstance(figures, GainFigures):
            figures = GainFigures(2.0 * profile.clamp_nats, cycle=self._cycle)
        figures.update(gain, raw.tokens, record.client)
        kind.put(profile.version, figures)

    def update_distances(
        self, record: TokenRecord, version: str, before: ExactDistances, after: ExactDistances
    ) -> None:
        """Adds a record of an adapter, from the exact distances without and with it."""
        kind = self._kinds.get(record.kind or REST_KIND)
        if kind is None:
            return
        figures = kind.gains.get(version)
        if not isinstance(figures, DistanceGains):
            figures = DistanceGains(cycle=self._cycle)
        figures.update(before, after, record.client)
        kind.put(version, figures)

    def forget(self) -> None:
        """Begins all figures anew. Totals go on."""
        for name, kind in self._kinds.items():
            self._kinds[name] = _Kind(self._cycle, totals=kind.totals)

    def report(self) -> list[dict[str, Any]]:
        """Returns the figures by kind, the kind with most requests first; JSON-ready. `profile`: the version that
        `gain_nats` and `recovered` belong to, which is the last one that served the kind or, in `observe`, would have.
        """
        result = []
        for name, kind in sorted(self._kinds.items(), key=lambda item: (-item[1].raw.requests, item[0])):
            version, gain = kind.latest()
            treated, control = kind.served[Arm.TREATED], kind.served[Arm.CONTROL]
            differences = {name: difference(treated, control, name) for name in DIFFERENCES}
            result.append(
                {
                    "kind": name,
                    "requests": kind.raw.requests,
                    "tokens": kind.raw.tokens,
                    "raw": kind.raw.summary(),
                    "arms": {
                        **{str(arm): figures.summary() for arm, figures in kind.served.items() if figures.requests},
                        "treated_minus_control": differences,
                    },
                    "profile": version,
                    "gain_nats": gain.gained() if gain is not None else None,
                    "recovered": gain.recovered() if gain is not None else None,
                }
            )
        return result

    def samples(self) -> Iterator[Sample]:
        for name, kind in self._kinds.items():
            for arm, (tokens, nats) in kind.totals.items():
                yield Sample(self._metrics.kl_nats, (name, arm), nats)
                yield Sample(self._metrics.kl_tokens, (name, arm), tokens)
            if kind.raw.requests:
                yield from inflation_samples(name, "kl_nats", kind.raw.requests, kind.raw.inflation("kl_nats"))
                if (ratio := self._metrics.draft_acceptance) is not None:
                    accepted = kind.raw.draft_acceptance()
                    for edge in ("lower", "upper"):
                        if accepted[edge] is not None:
                            yield Sample(ratio, (name, edge), accepted[edge])
            _, gain = kind.latest()
            if gain is None or not gain.requests:
                continue
            for weighting, sequence in (("token", gain.by_token), ("request", gain.by_request)):
                yield Sample(self._metrics.gain_nats, (name, weighting), sequence.get().mean)
            recovered = gain.recovered()
            ratio = self._metrics.recovered_ratio
            if ratio is not None and recovered is not None and recovered["estimate"] is not None:
                yield Sample(ratio, (name,), recovered["estimate"])
